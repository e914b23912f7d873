"""Change the norms of a model and keep its values: swap, fold, recalibrate, freeze, synchronise.

Every operation works out a plan before it acts, and returns it; ``dry_run=True`` stops there. After an error the model is as it was.
"""

from __future__ import annotations

from equinorm.surgery.fold import fold as fold
from equinorm.surgery.plan import Change as Change
from equinorm.surgery.plan import Plan as Plan
from equinorm.surgery.plan import Refusal as Refusal
from equinorm.surgery.swap import swap as swap
