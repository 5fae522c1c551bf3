"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.audits.attacks.client_canaries import audit_clients as audit_clients
from choral.audits.attacks.inversion import inversion_audit as inversion_audit
from choral.audits.attacks.membership import confidences as confidences
from choral.audits.attacks.membership import lira_offline as lira_offline
from choral.audits.attacks.membership import lira_online as lira_online
from choral.audits.attacks.membership import logit_gap as logit_gap
from choral.audits.attacks.membership import loss_threshold as loss_threshold
from choral.audits.attacks.membership import rmia as rmia
from choral.audits.attacks.probing import probe as probe
from choral.audits.attacks.probing_shares import probe_shares as probe_shares
from choral.audits.attacks.score_audit import audit_scores as audit_scores
from choral.audits.attacks.score_audit import audit_training as audit_training
from choral.audits.attacks.score_audit import canaries_needed as canaries_needed
from choral.audits.attacks.score_bounds import TooFewCanariesError as TooFewCanariesError
from choral.audits.attacks.score_files import read_scores as read_scores
from choral.audits.attacks.shadow_models import coin_members as coin_members
from choral.audits.attacks.shadow_models import train_shadows as train_shadows
from choral.audits.comparison.comparison import Comparison as Comparison
from choral.audits.comparison.comparison import compare as compare
from choral.audits.costs.prices import PriceSettings as PriceSettings
from choral.audits.costs.prices import read_prices as read_prices
from choral.audits.findings.schema import ReportError as ReportError
from choral.audits.lower_bounds.guessing import FixedShares as FixedShares
from choral.audits.lower_bounds.guessing import SampleSplit as SampleSplit
from choral.audits.run.run_audit import Audit as Audit
from choral.audits.run.run_audit import audit as audit
