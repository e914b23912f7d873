"""What is done with a probe's report: shown in a terminal or as a page, prescribed from, and acted on.

:mod:`equinorm.probe` measures and diagnoses, and needs nothing but torch; here are the parts that need more, and that change models.
"""

from __future__ import annotations
