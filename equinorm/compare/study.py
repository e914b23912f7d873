"""The queue of cells: an Optuna study in a database, shared by any number of commands on any number of machines.

A cell is a trial that carries the cell in its user attributes. Its life: WAITING; RUNNING once a command has claimed it, with a heartbeat;
then COMPLETE with a result, or FAIL with the attribute ``failure`` (a reason that stands) or without it (its command was killed: it is
queued again).

Two commands that start together may queue the same cell twice. The trial with the lower number is the cell's; the other is never claimed,
and discarded when it is seen.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, exc

from equinorm.compare.cells import Cell
from equinorm.compare.errors import InputError
from equinorm.compare.outcomes import Failed, Measured, Outcome
from equinorm.compare.plan import fingerprint

LOCK_TIMEOUT_S = 60
OPENING_TRIES = 20
ANOTHER_OPENS_TOO = ("already exists", "duplicate", "locked", "unique")  # in the messages of the three databases
HISTORY = "history "


STORAGE_ERRORS = (exc.SQLAlchemyError, StorageInternalError)


@dataclass(frozen=True)
class Claim:
    """A cell that this command is measuring."""

    cell: Cell
    trial_id: int


class Study:
    """The study of one comparison.

    Args:
        storage: database URL, as SQLAlchemy takes it.
        name: name of the study in the database.
        identity: what all its cells have in common, see :meth:`equinorm.compare.plan.Plan.identity`.
        direction: which way the metric is better.
        stale_after: seconds without a heartbeat after which a claimed cell counts as lost.

    Raises:
        InputError: the database cannot be opened, or holds another comparison under this name.
    """

    def __init__(self, storage: str, name: str, identity: dict[str, Any], direction: str, stale_after: int = 30) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self.stale_after = stale_after
        self.heartbeat_interval = max(1, stale_after // 5)
        self._storage = _open(storage, self.heartbeat_interval, stale_after)
        self._study = self._join(storage, identity, direction)
        self._study_id = self._storage.get_study_id_from_name(name)

    def enqueue(self, cells: Sequence[Cell], retry_failed: bool = False) -> int:
        """Queue the cells that are neither measured, nor failed for a reason, nor queued already.

        Args:
            cells: in the order in which they are to be measured.
            retry_failed: queue again those that failed for a reason.

        Returns:
            The number of cells queued.
        """
        settled = {_key(trial) for trial in self._trials() if _alive(trial) or (not retry_failed and "failure" in trial.user_attrs)}
        missing = [cell for cell in cells if cell.key not in settled]
        for cell in missing:
            self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"cell": asdict(cell)}))
        if missing:
            self._discard_surplus()
        return len(missing)

    def claim(self, keys: Collection[str]) -> Claim | None:
        """Take the next waiting cell among ``keys``; None if there is none."""
        seen: set[str] = set()
        for trial in filter(_alive, self._trials()):
            key = _key(trial)
            if key in seen:
                continue
            seen.add(key)
            if trial.state is TrialState.WAITING and key in keys:
                trial_id = self._trial_id(trial)
                # The heartbeat first: a command killed right after its claim must leave one behind, or nobody would miss it.
                self._storage.record_heartbeat(trial_id)
                if self._set_state(trial_id, TrialState.RUNNING):
                    return Claim(Cell(**trial.user_attrs["cell"]), trial_id)
        return None

    def beat(self, claims: Iterable[Claim]) -> None:
        """Show that these cells are still being measured."""
        for claim in claims:
            self._storage.record_heartbeat(claim.trial_id)

    def finish(self, claim: Claim, outcome: Outcome, metric: str) -> None:
        """Record what became of a cell; its value is ``metric``. Without effect if it was taken for lost and settled by another command."""
        try:
            if isinstance(outcome, Measured):
                record = outcome.to_json()
                for name, values in record.pop("history").items():  # apart, since MySQL limits the size of an attribute
                    self._storage.set_trial_user_attr(claim.trial_id, HISTORY + name, values)
                self._storage.set_trial_user_attr(claim.trial_id, "result", record)
                self._storage.set_trial_state_values(claim.trial_id, TrialState.COMPLETE, [outcome.score(metric)])
            else:
                self._storage.set_trial_user_attr(claim.trial_id, "failure", outcome.to_json())
                self._storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass

    def release(self, claim: Claim) -> None:
        """Give a cell up unmeasured; it waits again."""
        self._set_state(claim.trial_id, TrialState.FAIL)
        self.enqueue([claim.cell])

    def recover(self, cells: Sequence[Cell]) -> int:
        """Queue again the cells of commands that were killed. Returns their number."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        return self.enqueue(cells)

    def unfinished(self, keys: Collection[str]) -> set[str]:
        """Those of ``keys`` that are still to measure, or are being measured, here or elsewhere."""
        complete, open_, failed = set(), set(), set()
        for trial in self._trials():
            if trial.state is TrialState.COMPLETE:
                complete.add(_key(trial))
            elif _alive(trial):
                open_.add(_key(trial))
            elif "failure" in trial.user_attrs:
                failed.add(_key(trial))
        return {key for key in keys if key not in complete and (key in open_ or key not in failed)}

    def running(self, keys: Collection[str]) -> set[str]:
        """Those of ``keys`` that are being measured, here or elsewhere."""
        return {key for trial in self._trials() if trial.state is TrialState.RUNNING and (key := _key(trial)) in keys}

    def outcomes(self, keys: Collection[str]) -> dict[str, Outcome]:
        """What became of the cells that are finished."""
        found: dict[str, Outcome] = {}
        for trial in self._trials():
            key = _key(trial)
            if key not in keys or isinstance(found.get(key), Measured):
                continue
            if trial.state is TrialState.COMPLETE:
                history = {name.removeprefix(HISTORY): values for name, values in trial.user_attrs.items() if name.startswith(HISTORY)}
                found[key] = Measured(history=history, **trial.user_attrs["result"])
            elif trial.state is TrialState.FAIL and "failure" in trial.user_attrs:
                found[key] = Failed(**trial.user_attrs["failure"])
        return found

    def _trials(self) -> Iterator[FrozenTrial]:
        return (trial for trial in self._study.get_trials(deepcopy=False) if "cell" in trial.user_attrs)

    def _discard_surplus(self) -> None:
        seen: set[str] = set()
        for trial in filter(_alive, self._trials()):
            if trial.state is TrialState.WAITING and _key(trial) in seen:
                self._set_state(self._trial_id(trial), TrialState.FAIL)
            seen.add(_key(trial))

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _set_state(self, trial_id: int, state: TrialState) -> bool:
        try:
            return self._storage.set_trial_state_values(trial_id, state)
        except UpdateFinishedTrialError:
            return False

    def _join(self, storage: str, identity: dict[str, Any], direction: str) -> optuna.Study:
        try:
            study = optuna.create_study(storage=self._storage, study_name=self.name, direction=StudyDirection[direction.upper()])
            study.set_user_attr("equinorm compare", identity)
            return study
        except DuplicatedStudyError:
            study = optuna.load_study(storage=self._storage, study_name=self.name)
        for _ in range(OPENING_TRIES):  # the command that made the study may be about to state what it is
            if (stated := study.user_attrs.get("equinorm compare")) is not None:
                break
            time.sleep(0.1)
        else:
            raise InputError(
                f"study {self.name!r} in {shown(storage)} was not made by `equinorm compare`: choose another name with --study"
            )
        if fingerprint(stated) != fingerprint(identity):
            different = [f"{key} was {stated.get(key)!r}, now {value!r}" for key, value in identity.items() if stated.get(key) != value]
            raise InputError(
                f"study {self.name!r} in {shown(storage)} holds another comparison, and results of the two must not be mixed "
                f"({'; '.join(different)}): choose another --out folder or another --study name"
            )
        return study


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, whatever characters its name has."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def shown(storage: str) -> str:
    """A database URL without its password."""
    try:
        return sqlalchemy.make_url(storage).render_as_string(hide_password=True)
    except exc.ArgumentError:
        return storage


def _key(trial: FrozenTrial) -> str:
    return Cell(**trial.user_attrs["cell"]).key


def _alive(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


def _open(url: str, heartbeat_interval: int, stale_after: int) -> optuna.storages.RDBStorage:
    try:
        sqlite = sqlalchemy.make_url(url).get_backend_name() == "sqlite"
    except exc.ArgumentError as error:
        raise InputError(f"storage {url!r} is not a database URL such as sqlite:///study.db or postgresql://user@host/name") from error
    attempt = 0
    while True:
        attempt += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                opened = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}} if sqlite else None,
                    heartbeat_interval=heartbeat_interval,
                    grace_period=stale_after,
                )
            if sqlite:
                _lock_on_begin(opened.engine)
            return opened
        except ImportError as error:
            raise InputError(f"storage {shown(url)}: its database driver is not installed ({error.__cause__ or error})") from error
        except (*STORAGE_ERRORS, RuntimeError) as error:
            # Two commands that make the tables of a new database at the same moment get in each other's way; the next try finds them made.
            if attempt == OPENING_TRIES or not any(sign in str(error).lower() for sign in ANOTHER_OPENS_TOO):
                raise InputError(f"storage {shown(url)} cannot be opened: {first_line(error)}") from error
            time.sleep(0.1)


def _lock_on_begin(engine: sqlalchemy.Engine) -> None:
    """Make every SQLite transaction take the write lock when it begins.

    SQLite has no SELECT FOR UPDATE. With the default, deferred transactions two commands could both read that a trial is waiting, and both
    claim it.
    """

    @event.listens_for(engine, "connect")
    def _leave_transactions_to_sqlalchemy(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _take_the_lock(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the listeners


def first_line(error: BaseException) -> str:
    """The part of a database error that says what is wrong."""
    return (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
