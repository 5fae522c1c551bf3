"""Who computes what: local steps, federated algorithms, the cloud baseline, engines."""

from __future__ import annotations

from choral.trainers.run import Round, Run, RunFolderError, RunInfo

__all__ = ["Round", "Run", "RunFolderError", "RunInfo"]
