"""The site.toml that `choral site init` writes: every key with its meaning, what must be filled in as comments."""

SITE_TOML = """\
# What the site NAME accepts. Nobody else reads this file, and no coordinator is told what is in it.
# Every key is explained in docs/sites.md. After a change: `choral site show`.

name = "NAME"

# Whom this site connects to; pin its certificate by `choral site directory add FILE.crt --coordinator --pin PIN`.
# [coordinators.hub]
# address = "hub.example.org:8443"            # left out where an engine brings its requests
# proxy = "http://proxy.example.org:3128"     # if the way out is by a proxy

[sum]                                 # the weakest secure sum that this site sends its vector into
kinds = ["masked", "homomorphic"]
corrupt = 1                           # other sites that may work together with the coordinator
minimum_cohort = 3                    # fewest sites whose sum may be opened
minimum_threshold = 2                 # fewest sites who together can reconstruct a secret of this one
server = "malicious"                  # the coordinator may lie; "semi-honest": it only looks
value_bound = 16.0                    # largest coordinate of an update
maximum_weight = 1048576              # most records that any site may count for

[job]                                 # what may be trained here
algorithms = ["fedavg", "fedprox"]    # "statistics": also `choral stats`, of the data of [tasks.statistics]
releases = ["fit", "derived"]         # "data": also values that are read from the records without noise
metrics = "none"                      # or "in the clear, no epsilon": sums of the sites' own evaluations

[maxima]
rounds = 100                          # of a job
parameters = 10_000_000               # of a model
bytes_a_day = 53_687_091_200
jobs_a_day = 10

# One data set: what may be known of it in all, over all jobs of its life, whoever asks.
# [data.visits]
# path = "/srv/visits.csv"
# records = 1200
# [data.visits.promise]
# epsilon = 3.0
# delta = 1e-5                        # below 1 / records
# max_grad_norm = 1.0

# Training code: a file in tasks/, and the one data set that it may read.
# [tasks."visits.py"]
# data = "visits"
"""
