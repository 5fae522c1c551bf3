"""The job of three hospitals by NVFlare, as it was approved: neither its offer nor the sites' folders change.

python job.py ../hospitals/job.toml --simulate doors --coordinator hub     # sites at doors/north.sock and so on
python job.py ../hospitals/job.toml --kit /opt/nvflare/admin@example.org   # a deployment; see docs/nvflare.md
"""

import argparse
from pathlib import Path

from nvflare.recipe.prod_env import ProdEnv
from nvflare.recipe.sim_env import SimEnv

from choral.network.nvflare import ChoralRecipe, write_local

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--sites", nargs="+", default=["north", "south", "east"])
    parser.add_argument("--simulate", type=Path, help="folder of the sites' sockets, NAME.sock")
    parser.add_argument("--coordinator", type=Path, help="the coordinator's folder, in a simulation")
    parser.add_argument("--kit", help="startup kit of an admin, in a deployment")
    parser.add_argument("--user", default="admin@nvidia.com")
    given = parser.parse_args()

    recipe = ChoralRecipe(given.settings)  # its name, its settings, and no code
    if given.simulate is None:
        env = ProdEnv(startup_kit_location=given.kit, username=given.user, login_timeout=120)
    else:
        workspace = Path("simulated").absolute()
        local = workspace / recipe.name / "local"  # which the simulator gives to all, as each has its own otherwise
        local.mkdir(parents=True, exist_ok=True)
        door, coordinator = given.simulate.absolute() / "{site}.sock", given.coordinator.absolute()
        write_local(local, door=str(door), coordinator=str(coordinator), runs=str(Path("runs").absolute()))
        env = SimEnv(clients=given.sites, workspace_root=str(workspace))
    run = recipe.execute(env)
    print(f"job {run.get_job_id()}: {run.get_status()}")
