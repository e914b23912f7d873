"""What is prescribed to the broken networks of the zoo: ``python -m tests.probe.cures``."""

from __future__ import annotations

import warnings

from tests.probe.zoo import BROKEN


def main() -> None:
    """Print, for each broken network, the first prescription that resolves the finding which names the cause."""
    warnings.filterwarnings("ignore")
    cured = 0
    for case in BROKEN:
        prescriptions = case.report().prescribe()
        best = next((p for p in prescriptions if set(case.kinds) & {finding.kind for finding in p.resolved}), None)
        cured += best is not None
        print(f"{case.name}: {case.broken}: {best.title if best else '-'}")
    print(f"{cured} of {len(BROKEN)} have a prescription that resolves the finding which names the cause")


if __name__ == "__main__":
    main()
