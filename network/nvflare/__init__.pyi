"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.jobs.engines.nvflare_job import ChoralRecipe as ChoralRecipe
from choral.jobs.engines.nvflare_job import ChoralServer as ChoralServer
from choral.network.nvflare.local_files import write_local as write_local
from choral.network.nvflare.site import ChoralSite as ChoralSite
