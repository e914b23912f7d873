"""Change the norms of a model and keep its values: swap, fold, recalibrate, freeze, synchronise.

Every operation works out a plan before it acts, and returns it; ``dry_run=True`` stops there. After an error the model is as it was.
"""

from __future__ import annotations

from equinorm.surgery.fold import fold as fold
from equinorm.surgery.freeze import freeze as freeze
from equinorm.surgery.freeze import unfreeze as unfreeze
from equinorm.surgery.layout import MovedChannels as MovedChannels
from equinorm.surgery.plan import Change as Change
from equinorm.surgery.plan import Plan as Plan
from equinorm.surgery.plan import Refusal as Refusal
from equinorm.surgery.recalibrate import recalibrate as recalibrate
from equinorm.surgery.record import Replaced as Replaced
from equinorm.surgery.swap import swap as swap
from equinorm.surgery.sync import sync as sync
from equinorm.surgery.sync import unsync as unsync
