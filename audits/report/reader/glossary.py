"""The words of a report, each in a sentence."""

from __future__ import annotations

GLOSSARY = (
    ("Configuration", "one way to train the same model: pooled or distributed, with or without privacy."),
    ("Data owner, party", "whoever holds records: a hospital, a company, a device."),
    ("Server", "the machine that adds updates up and sends models out. In the cloud, the one that has the data."),
    ("Secure sum", "a protocol by which the server learns the sum of the parties' updates, and no single one."),
    ("Differential privacy", "noise, so sized that the result is about as likely with one record as without it."),
    ("ε (epsilon)", "how much more likely at most, as a power of e. 0 would tell nothing; smaller is stronger."),
    ("δ (delta)", "the probability that is left outside of that bound."),
    ("Unit", "whose presence is hidden: one record, or all that one client has."),
    ("Ledger", "the list of all noisy steps on a data owner's records; ε is computed from it."),
    ("Composition", "what several releases of the same records cost together. More than each by itself."),
    ("Canary", "a record that was made for an attack, and put in or left out by a coin."),
    ("Lower bound on ε", "what an attack proves to have leaked. Below the claim, it proves nothing."),
    ("Ceiling", "the largest ε that an attack could have shown. It cannot refute a claim above that."),
    ("Null control", "the same attack on coins that the model never saw. It should find nothing."),
    ("Manifest", "a signed list of digests that binds all files of a run together."),
    ("Rehearsal", "all parties in one process. It shows what a federation would do, and protects nobody's data."),
)
