"""Jobs whose messages an engine carries: what NVFlare and Flower run at the coordinator."""
