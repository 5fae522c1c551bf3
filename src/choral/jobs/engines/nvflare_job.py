"""A job with sites in NVFlare: the recipe that makes it, and the controller that is its coordinator.

The controller runs where NVFlare's server runs. The coordinator's key, the sites' certificates and its training code
are in the folder that the server's own `local/choral.json` names; a job brings the text of its settings, and no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal
from nvflare.job_config.api import FedJob
from nvflare.job_config.fed_job_config import FedJobConfig
from nvflare.recipe.spec import Recipe

from choral.errors import ChoralError, ConfigError
from choral.jobs.serving import serve_by_engine
from choral.jobs.settings import Settings, parse_job, read_settings
from choral.network.nvflare.local_files import read_local
from choral.network.nvflare.messages import Aborted, NVFlareMessages
from choral.network.nvflare.site import ChoralSite


class ChoralServer(Controller):  # type: ignore[misc]  # NVFlare has no types
    """See the module. settings: the job file's text. job: its name, as sites approved it. resume: go on with the run
    of that name, which `runs` in the server's choral.json keeps.
    """

    def __init__(self, settings: str, job: str, resume: bool = False) -> None:
        super().__init__()
        self.settings, self.job, self.resume = settings, job, resume

    def start_controller(self, fl_ctx: FLContext) -> None:
        pass

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:  # noqa: ARG002  the context has it
        workspace = fl_ctx.get_workspace()
        try:
            local = read_local(Path(workspace.get_site_config_dir()))
            if "coordinator" not in local:
                raise ConfigError("choral.json of the server names no coordinator", hint='{"coordinator": FOLDER}')
            runs = Path(local["runs"]) if "runs" in local else Path(workspace.get_run_dir(fl_ctx.get_job_id()))
            settings = parse_job(self.settings, self.job)
            run = serve_by_engine(
                NVFlareMessages(fl_ctx, away=settings.serve.away),
                settings,
                Path(local["coordinator"]),
                out=runs / (self.job if "runs" in local else "choral"),
                resume=self.resume,
                say=lambda text: self.log_info(fl_ctx, text, fire_event=False),
            )
        except Aborted:
            self.log_info(fl_ctx, "the job was aborted; its run can be gone on with", fire_event=False)
        except ChoralError as error:
            self.system_panic(f"{error} ({error.hint})", fl_ctx)
        else:
            self.log_info(fl_ctx, f"{run.history[-1].round} rounds, run folder {run.folder}", fire_event=False)


class ChoralRecipe(Recipe):  # type: ignore[misc]
    """A job file of `choral serve` as a job of NVFlare.

    settings: the file. min_clients: with fewer NVFlare ends the job, so no more than the secure sum needs.

    Raises: ConfigError as the settings do.
    """

    def __init__(self, settings: str | Path, *, min_clients: int = 2, resume: bool = False) -> None:
        path = Path(settings)
        name = read_settings(path, Settings).serve.job or path.stem
        super().__init__(job_of(ChoralServer(path.read_text(), name, resume), ChoralSite(), min_clients=min_clients))


def job_of(server: ChoralServer, site: ChoralSite, *, min_clients: int) -> Any:
    """NVFlare's job of these two, without their code."""
    made = FedJob(name=server.job, min_clients=min_clients)
    made.job = _WithoutCode(job_name=server.job, min_clients=min_clients)
    made.to_server(server)
    made.to_clients(site, tasks=["choral"])
    return made


class _WithoutCode(FedJobConfig):  # type: ignore[misc]
    """Names the classes of components and copies none of their files into the job: they are installed at both ends."""

    def _get_class_path(self, obj: Any, custom_dir: str) -> str:  # noqa: ARG002
        return f"{type(obj).__module__}.{type(obj).__name__}"
