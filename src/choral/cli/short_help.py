"""The first page of help of the commands that have hundreds of flags; `--help-all` prints every one."""

from __future__ import annotations

_ALL = """\
Every key of CONFIG is a flag of the same name, and the flag wins:
--privacy.epsilon 4, --split.alpha 0.1. All of them: choral {command} --help-all
"""
_MATTER = """\
settings that matter (in CONFIG, or as flags):
  --training.rounds N            rounds; the cloud makes as many passes
  --training.learning-rate X     step size of SGD
  --training.batch-size N        records per step
  --privacy.epsilon X            budget of each data owner for the whole run
  --privacy.delta X              chance outside the promise; below 1 / records
  --secure-sum.kind KIND         plain, masked or homomorphic
  --algorithm.kind KIND          fedavg, fedprox, scaffold, fedsgd, fsvrg, ...
  --split.kind KIND              dirichlet, shards, iid, or key
  --seed N                       first seed: weights, split and data order
"""

SHORT = {
    "compare": f"""\
usage: choral compare CONFIG --out DIR [flags]

Train every configuration of a TOML file for several seeds, audit every run, and
write report.html and report.json. choral init writes a CONFIG for your data.

  --out DIR                      new or empty folder for runs and report
  --resume                       go on in a folder that was interrupted
  --seeds N                      trainings of each configuration (default 3)
  --workers N                    runs side by side; by default one per core
  --json                         print the report as JSON, and nothing else
  --quiet                        no progress and no table

{_MATTER}
{_ALL.format(command="compare")}
exit codes: 0 nothing contradicts what is claimed, 1 a claim is violated or not
            verifiable, 2 bad input, or a configuration could not be trained
""",
    "train": f"""\
usage: choral train CONFIG --out DIR [flags]

Train one configuration into a run folder: federated, or --centralized; private
if privacy.epsilon is set.

  --out DIR                      new or empty run folder
  --arm NAME                     train this configuration of CONFIG
  --centralized                  pool the data: the cloud baseline
  --resume                       continue the run that the folder holds
  --json                         print what came of it as JSON, and nothing else
  --quiet                        no progress and no summary

{_MATTER}
{_ALL.format(command="train")}
exit codes: 0 trained, 2 bad input, or the run had to stop
""",
    "serve": f"""\
usage: choral serve CONFIG --directory FILE --out DIR [flags]

Train with sites at their own machines: wait for them, offer the job, sum what
they send, keep the run. docs/deployment.md has all steps.

  --directory FILE               the sites' pinned certificates
  --out DIR                      new or empty run folder
  --offer FILE                   write the offer for sites to review, and stop
  --resume                       continue the run that the folder holds
  --serve.identity FILE          the coordinator's certificate, NAME.crt
  --serve.port N                 port to listen at (default 8443)
  --sites.records N              records of all sites together, as agreed
  --sites.largest N              the most records that one site may have
  --json                         print what came of it as JSON
  --quiet                        no progress and no summary

{_MATTER}
{_ALL.format(command="serve")}
exit codes: 0 trained, 2 bad input, or the run had to stop
""",
    "poc": f"""\
usage: choral poc CONFIG --out DIR [flags]

Rehearse a job with sites on this machine: keys, folders, approvals, a process
for each site, one report.

  --out DIR                      new or empty folder for everything
  --sites N                      of a task that comes with Choral (default 3)
  --data DIR                     for a task file: a file or folder for each site
  --resume                       go on with the rehearsal in the folder
  --json                         print audit and sites' spending as JSON
  --quiet                        no progress and no summary

{_MATTER}
{_ALL.format(command="poc")}
exit codes: 0 done, 1 a claim is violated, 2 bad input, or it had to stop
""",
}
