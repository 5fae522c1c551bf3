"""What runs at the coordinator: Flower's own quickstart, and two changed lines."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from choral.network.flower import Secure  # new
from visits.task import new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(new_model().state_dict())
    strategy = Secure(FedAvg(), context.run_config["job"])  # was FedAvg()
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    if context.run_config["out"]:
        save_file(dict(result.arrays.to_torch_state_dict()), context.run_config["out"])
