"""The queue: each cell is measured once, whoever claims it, and cells of the dead come back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from equinorm.compare.cells import grid
from equinorm.compare.errors import InputError
from equinorm.compare.outcomes import Failed, Measured
from equinorm.compare.study import Study, shown

CELLS = grid(["none", "batch"], [2, 4], [0, 1], [])
KEYS = {cell.key for cell in CELLS}
MEASURED = Measured({"accuracy": [0.5, 0.75]}, seconds=1.0, seconds_per_epoch=0.5, peak_memory=1)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


def study(url, name="s", stale_after=30, **identity):
    return Study(url, name, {"task": "t", **identity}, "maximize", stale_after)


def states(url, name="s"):
    return [trial.state for trial in optuna.load_study(storage=url, study_name=name).trials]


def test_order_is_seed_by_seed_and_small_batches_first():
    assert [cell.key for cell in CELLS[:3]] == ["none batch_size=2 seed=0", "batch batch_size=2 seed=0", "none batch_size=4 seed=0"]
    assert CELLS[4].seed == 1


def test_a_cell_is_queued_claimed_and_settled_once(url):
    queue = study(url)
    assert queue.enqueue(CELLS) == 8
    assert queue.enqueue(CELLS) == 0
    claim = queue.claim(KEYS)
    assert claim.cell == CELLS[0]
    assert queue.running(KEYS) == {CELLS[0].key}
    queue.finish(claim, MEASURED, "accuracy")
    assert queue.outcomes(KEYS) == {CELLS[0].key: MEASURED}
    assert queue.unfinished(KEYS) == KEYS - {CELLS[0].key}
    assert queue.enqueue(CELLS) == 0
    assert queue.claim({"another"}) is None
    (trial, *_) = optuna.load_study(storage=url, study_name="s").get_trials(states=[TrialState.COMPLETE])
    assert trial.value == 0.75


def test_a_failure_is_settled_unless_it_is_tried_again(url):
    queue = study(url)
    queue.enqueue(CELLS[:1])
    failed = Failed("diverged", "loss is nan after epoch 3", epoch=2)
    queue.finish(queue.claim(KEYS), failed, "accuracy")
    assert queue.outcomes(KEYS) == {CELLS[0].key: failed}
    assert queue.unfinished({CELLS[0].key}) == set()
    assert queue.enqueue(CELLS[:1]) == 0
    assert queue.enqueue(CELLS[:1], retry_failed=True) == 1
    assert queue.unfinished({CELLS[0].key}) == {CELLS[0].key}
    queue.finish(queue.claim(KEYS), MEASURED, "accuracy")
    assert queue.outcomes(KEYS) == {CELLS[0].key: MEASURED}


def test_threads_that_claim_at_once_get_different_cells(url):
    study(url).enqueue(CELLS)

    def work(_):
        queue, claimed = study(url), []
        while (claim := queue.claim(KEYS)) is not None:
            claimed.append(claim.cell.key)
            queue.finish(claim, MEASURED, "accuracy")
        return claimed

    with ThreadPoolExecutor(4) as pool:
        claimed = [key for keys in pool.map(work, range(4)) for key in keys]
    assert sorted(claimed) == sorted(KEYS)
    assert states(url) == [TrialState.COMPLETE] * 8


def test_a_cell_queued_twice_is_measured_once(url):
    queue = study(url)
    queue.enqueue(CELLS[:2])
    # What a second command adds that looked before the first had queued anything.
    late = optuna.load_study(storage=url, study_name="s")
    for cell in CELLS[:2]:
        late.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"cell": asdict(cell)}))
    claims = [queue.claim(KEYS), queue.claim(KEYS)]
    assert [claim.cell for claim in claims] == CELLS[:2]
    assert queue.claim(KEYS) is None
    for claim in claims:
        queue.finish(claim, MEASURED, "accuracy")
    assert queue.claim(KEYS) is None
    assert queue.unfinished({cell.key for cell in CELLS[:2]}) == set()
    queue.enqueue(CELLS[:3])  # whoever queues next tidies up
    assert states(url) == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] * 2 + [TrialState.WAITING]


def test_cells_of_the_dead_come_back_and_those_of_the_living_do_not(url):
    dead, alive = study(url, stale_after=1), study(url, stale_after=1)
    dead.enqueue(CELLS[:2])
    lost, kept = dead.claim(KEYS), alive.claim(KEYS)
    assert alive.recover(CELLS[:2]) == 0
    deadline = time.monotonic() + 20
    while not (recovered := alive.recover(CELLS[:2])):  # database clocks count whole seconds
        assert time.monotonic() < deadline
        alive.beat([kept])
        time.sleep(0.2)
    assert recovered == 1
    again = alive.claim(KEYS)
    assert again.cell == lost.cell
    alive.finish(again, MEASURED, "accuracy")
    dead.finish(lost, Failed("error", "too late"), "accuracy")  # it was not dead after all: its result is dropped
    assert alive.outcomes({lost.cell.key}) == {lost.cell.key: MEASURED}
    assert alive.running(KEYS) == {kept.cell.key}


def test_a_released_cell_waits_again(url):
    queue = study(url)
    queue.enqueue(CELLS[:1])
    queue.release(queue.claim(KEYS))
    assert queue.unfinished({CELLS[0].key}) == {CELLS[0].key}
    assert queue.claim(KEYS).cell == CELLS[0]


def test_other_studies_are_refused(url):
    study(url, lr=0.1)
    with pytest.raises(InputError, match=r"holds another comparison.*lr was 0\.1, now 0\.2.*--study"):
        study(url, lr=0.2)
    optuna.create_study(storage=url, study_name="foreign")
    with pytest.raises(InputError, match=r"'foreign'.*was not made by `equinorm compare`"):
        study(url, name="foreign")


def test_passwords_are_not_shown():
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    with pytest.raises(InputError, match=r"postgresql\+nodriver://me:\*\*\*@host/db") as refused:
        study("postgresql+nodriver://me:secret@host/db")
    assert "secret" not in str(refused.value)
