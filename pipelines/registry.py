"""The registry: versions of `grimace-TASK` in MLflow, the aliases on them, and who moved them.

A version carries all that it takes to use, judge and make it again: the Keras model (it loads as
`models:/grimace-emotion@champion`), the bundles, reports, lineage and its blessing. It comes to be
in one step, when everything is there.

The alias `champion` decides alone. It moves in one transaction of the store, so that a promotion or
rollback that is killed leaves either the old champion or the new one. The audit trail, in tags of
the registered model, is written before: an entry whose move never came is told from one that did by
the next entry, or by where the alias is. `previous` follows from the trail and is set after; where
a kill came between, the next promotion or rollback sets it.

Moves are kept apart by a lock in the working copy. A store that several working copies share has
one of them to promote in.
"""

import fcntl
import getpass
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

from pipelines import tracking
from pipelines.cli import GrimaceError
from pipelines.params import Params, TaskName, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MODEL = Path("data/model.keras")  # in a version's folder, where MLflow's Keras flavour looks
BUNDLES = Path("bundles")
AUDIT = "grimace.audit."
SHA256 = "grimace.sha256"
BLESSING = "grimace.blessing_sha256"
NETWORK = "grimace.model_sha256"
CROWNED = "grimace.had_champion"  # on the registered model, once the alias has been there
FILES = Path("files.json")  # of a version: the SHA-256 of all else that it was registered with
FILES_SHA256 = "grimace.files_sha256"
JUDGED = ("blessing.json", "gates.md", "answers.npz")  # what the gate adds to a version
GATES = "\n## Gates\n\n"
PAGE_LENGTH = 5000  # what the store holds of a version's description, and of a tag


class Event(NamedTuple):
    """One move of the alias `champion`.

    Attributes:
        action: what was asked for.
        before: the version it was on, None for none.
        after: the version it is moved to.
        who: asked for it.
        when: UTC, ISO 8601.
        why: their reason.
        overrides: gates that were not passed, with who signed for them and why.
    """

    action: Literal["promote", "rollback"]
    before: int | None
    after: int
    who: str
    when: str
    why: str
    overrides: list[dict[str, str]]


class RefusedError(GrimaceError):
    """A version may not become champion, and asking again will change nothing."""


class StaleBlessingError(GrimaceError):
    """A version was judged against another champion than there is now; judging anew may help."""


class Registry:
    """One task's registered model.

    Args:
        settings: the params' section.
        task: whose model.

    Raises:
        GrimaceError: the store does not answer.
    """

    def __init__(self, settings: Tracking, task: TaskName) -> None:
        self.settings, self.task, self.name = settings, task, f"grimace-{task}"
        self.client = tracking.connect(settings, task)

    # Looking

    def aliases(self) -> dict[str, int]:
        """Return the version that each alias is on."""
        return {alias: int(number) for alias, number in self._model().aliases.items()}

    def versions(self) -> list["ModelVersion"]:
        """Return all versions, oldest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return sorted(found, key=lambda version: int(version.version))

    def with_bytes(self, sha256: str) -> int | None:
        """Return the newest version that holds these files, by the `digest` of their SHA-256."""
        numbers = [int(v.version) for v in self.versions() if v.tags.get(SHA256) == sha256]
        return max(numbers, default=None)

    def version(self, number: int) -> "ModelVersion":
        """Return a version.

        Raises:
            GrimaceError: there is none of this number.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version(self.name, str(number))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            there = ", ".join(str(v.version) for v in self.versions()) or "none"
            raise GrimaceError(f"{self.name} has no version {number}; it has {there}") from None

    def champion(self) -> int | None:
        """Return the champion; None where there never was one.

        Raises:
            GrimaceError: there was one, and the alias or the version is gone.
        """
        number = self.aliases().get("champion")
        if number is not None:
            self.version(number)
            return number
        if CROWNED not in self._model().tags:  # at most a first promotion was begun
            return None
        asked = {event.after for event in self.trail()}
        raise GrimaceError(
            f"{self.name} had a champion and has none now: the alias is gone, or its version was "
            f"deleted. Candidates cannot be judged without it. `python -m flows.promote --task "
            f"{self.task} --rollback --to VERSION` brings one back; the audit trail names "
            f"{', '.join(map(str, sorted(asked)))}"
        )

    def trail(self) -> list[Event]:
        """Return every move of `champion` that was begun, oldest first."""
        tags = self._model().tags
        return [Event(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(AUDIT)]

    def moves(self) -> list[Event]:
        """Return the moves that came to their end."""
        trail, now = self.trail(), self.aliases().get("champion")
        done = []
        for event, after in zip_longest(trail, trail[1:]):
            if after is None:
                moved = now == event.after
            else:  # who rolls back with no champion there does so because it was lost
                lost = after.before is None and after.action == "rollback"
                moved = lost or after.before == event.after
            if moved:
                done.append(event)
        return done

    def before(self, number: int) -> int | None:
        """Return the version that this one took the place of when it was promoted."""
        promoted = [e for e in self.moves() if e.action == "promote" and e.after == number]
        return promoted[-1].before if promoted else None

    def fetch(self, number: int) -> Path:
        """Return a folder with a version's files, which are not to be changed.

        Raises:
            GrimaceError: the store has lost them.
        """
        import mlflow

        version = self.version(number)
        try:
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=version.source))
        except Exception as error:  # each kind of store has its own
            raise GrimaceError(
                f"the files of {self.name} version {number} cannot be had from {version.source}: "
                f"{' '.join(str(error).split())}"
            ) from None
        if not folder.is_dir():
            raise GrimaceError(f"the files of {self.name} version {number} are gone: {folder}")
        return folder

    def blessing(self, number: int) -> dict[str, Any]:
        """Return a version's blessing as the gate attached it.

        Raises:
            GrimaceError: there is none, or it is not the one that the gate attached.
        """
        path = self.fetch(number) / "blessing.json"
        wanted = self.version(number).tags.get(BLESSING)
        gate = f"`python -m pipelines.gate --task {self.task}`"
        if wanted is None or not path.is_file():
            raise GrimaceError(f"{self.name} version {number} was not judged yet; run {gate}")
        if tracking.sha256(path) != wanted:
            raise GrimaceError(
                f"the blessing of {self.name} version {number} is not the one that the gate "
                f"attached: {path} was changed. Judge it anew with {gate}"
            )
        return json.loads(path.read_text())

    def check_bytes(self, number: int, blessing: Mapping[str, Any]) -> None:
        """Compare a version's files with those that its blessing is for.

        All others, such as lineage and what tells MLflow how to load the model, have to be those
        that it was registered with.

        Raises:
            GrimaceError: a file is missing, changed or more.
        """
        folder = self.fetch(number)
        noted = folder / FILES
        known = self.version(number).tags.get(FILES_SHA256)
        if not noted.is_file() or tracking.sha256(noted) != known:
            raise GrimaceError(
                f"the list of the files of {self.name} version {number} is gone or was changed: "
                f"{noted}"
            )
        blessed = blessing["files"]
        at = {name: BUNDLES / name for name in blessed} | {"model.keras": MODEL}
        wanted = json.loads(noted.read_text())
        wanted |= {at[name].as_posix(): sha256 for name, sha256 in blessed.items()}
        there = _sums(folder)
        other = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        if other or {digest(blessed), self.sha256(number)} != {blessing["sha256"]}:
            raise GrimaceError(
                f"{self.name} version {number} was blessed for other bytes than it holds: "
                f"{', '.join(other) or 'its tag'} in {folder}"
            )

    def sha256(self, number: int) -> str:
        """Return the digest of all of a version's files, as it was registered."""
        return self.version(number).tags.get(SHA256, "")

    # Writing

    def register(
        self, folder: Path, model: Path, sha256: str, tags: Mapping[str, str], page: str
    ) -> int:
        """Make a folder a version, whole or not at all, and set the alias `candidate` on it.

        Args:
            folder: its files.
            model: whose training run holds them.
            sha256: the `digest` of the files that a blessing is about.
            tags: searchable facts.
            page: Markdown, its description.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        noted = folder / FILES
        noted.write_text(json.dumps(_sums(folder), indent=2) + "\n")
        # A place of its own: what a killed registration has left is not to be mixed in.
        place = f"registered/{sha256[:12]}-{uuid4().hex[:8]}"
        with tracking.run_of_model(self.settings, self.task, model) as run:
            mlflow.log_artifacts(str(folder), place)
        try:
            self.client.create_registered_model(self.name, description=about(self.name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            self.name,
            f"{run.info.artifact_uri}/{place}",
            run.info.run_id,
            tags={
                SHA256: sha256,
                FILES_SHA256: tracking.sha256(noted),
                "grimace.place": place,
                **tags,
            },
            description=page[:PAGE_LENGTH],
        )
        number = int(version.version)
        self.make_candidate(number)
        return number

    def make_candidate(self, number: int) -> None:
        """Set the alias `candidate`."""
        self.client.set_registered_model_alias(self.name, "candidate", str(number))

    def attach(self, number: int, folder: Path) -> None:
        """Add a folder with a blessing.json to a version; the tag set last makes it valid.

        Raises:
            GrimaceError: the version was made champion meanwhile, on the blessing that it had.
        """
        with self._alone():
            if number in {move.after for move in self.moves()}:
                raise GrimaceError(
                    f"{self.name} version {number} was made champion while it was judged again; "
                    "the blessing that it has stays"
                )
            self._attach(number, folder)

    def _attach(self, number: int, folder: Path) -> None:
        version = self.version(number)
        path = folder / "blessing.json"
        blessing = json.loads(path.read_text())
        self.client.log_artifacts(version.run_id, str(folder), version.tags["grimace.place"])
        self._tag(number, "grimace.blessed", str(blessing["blessed"]).lower())
        gates = GATES + (folder / "gates.md").read_text()
        page = (version.description or "").split(GATES)[0]
        if len(page) + len(gates) > PAGE_LENGTH:
            gates = (
                f"{GATES}{gates.removeprefix(GATES).split(chr(10))[0]}\n\nAll in blessing.json.\n"
            )
        self.client.update_model_version(
            self.name, str(number), page[: PAGE_LENGTH - len(gates)] + gates
        )
        self._tag(number, BLESSING, tracking.sha256(path))

    def promote(self, number: int, who: str, why: str, unattended: bool = False) -> Event | None:
        """Make a blessed version the champion.

        Args:
            number: the version.
            who: asks for it.
            why: their reason.
            unattended: nobody looks on. A network that was rolled back then stays away, however
                often it is exported anew.

        Returns:
            The entry of the audit trail; None where it is the champion already.

        Raises:
            RefusedError: it is not blessed, is older than the champion, or was rolled back.
            StaleBlessingError: it was judged against another champion.
            GrimaceError: it holds other bytes than were blessed; it or the champion is lost.
        """
        with self._alone():
            self._catch_up()
            champion = self.champion()
            if champion == number:
                return None
            self._refuse_if_older(number, champion)
            self._refuse_rolled_back(number, unattended)
            blessing = self.blessing(number)
            self._refuse_unblessed(number, blessing)
            self._refuse_stale(number, champion, blessing)
            self.check_bytes(number, blessing)
            overrides = [
                {"gate": row["name"], **row["overridden"]}
                for row in blessing["gates"]
                if row["overridden"]
            ]
            event = Event("promote", champion, number, who, _now(), why, overrides)
            self._move(event)
            return event

    def rollback(self, to: int | None, who: str, why: str) -> Event:
        """Make a former champion the champion again: the one before this one, or `to`.

        Said twice it goes back twice, unless `to` names the version.

        Raises:
            GrimaceError: there is none, it never was champion, it is not blessed, or its files are
                not whole.
        """
        with self._alone():
            self._catch_up()
            champion, moves = self.aliases().get("champion"), self.moves()
            if to is None:
                if champion is None:
                    self.champion()  # says what there is
                to = None if champion is None else self.before(champion)
            if to is None:
                raise GrimaceError(f"{self.name} has no champion before version {champion}")
            if to == champion:
                raise GrimaceError(f"version {to} is the champion of {self.name}")
            # One that was begun counts too: with the alias gone nobody knows whether it came.
            former = {event.after for event in (moves if champion else self.trail())}
            if to not in former:
                raise GrimaceError(
                    f"{self.name} version {to} never was champion "
                    f"({', '.join(map(str, sorted(former))) or 'nobody'} was); promote it instead"
                )
            blessing = self.blessing(to)
            # One whose promotion was begun and never came may have been judged anew.
            self._refuse_unblessed(to, blessing)
            self.check_bytes(to, blessing)
            event = Event("rollback", champion, to, who, _now(), why, [])
            self._move(event)
            return event

    def _refuse_if_older(self, number: int, champion: int | None) -> None:
        if champion is not None and number < champion:
            raise RefusedError(
                f"{self.name} version {number} is older than the champion, version {champion}; "
                f"only a rollback goes back: `python -m flows.promote --task {self.task} "
                f"--rollback --to {number}`"
            )

    def _refuse_rolled_back(self, number: int, unattended: bool) -> None:
        moves, network = self.moves(), self.version(number).tags.get(NETWORK)
        for version in self.versions() if unattended else [self.version(number)]:
            left = [event for event in moves if event.before == int(version.version)]
            if not left or left[-1].action != "rollback" or version.tags.get(NETWORK) != network:
                continue
            said = (
                f"version {version.version} was rolled back by {left[-1].who} on {left[-1].when} "
                f"({left[-1].why}). `python -m flows.promote --task {self.task}"
            )
            if int(version.version) == number:
                raise RefusedError(
                    f"{self.name} {said} --rollback --to {number}` brings it back where that was a "
                    "mistake"
                )
            raise RefusedError(
                f"{self.name} version {number} is the same network in other bundles, and {said} "
                f"--version {number} --why …` promotes it where the bundles were what was wrong"
            )

    def _refuse_unblessed(self, number: int, blessing: Mapping[str, Any]) -> None:
        # Not the flag alone: rows decide.
        rows = blessing["gates"]
        failed = [row["name"] for row in rows if not (row["passed"] or row["overridden"])]
        if failed or not rows or not blessing["blessed"]:
            raise RefusedError(
                f"{self.name} version {number} is not blessed: it fails "
                f"{', '.join(failed) or 'to have gates'}. See {self.fetch(number)}/blessing.json"
            )

    def _refuse_stale(self, number: int, champion: int | None, blessing: Mapping[str, Any]) -> None:
        judged = blessing["champion"] and blessing["champion"]["version"]
        if judged != champion:
            raise StaleBlessingError(
                f"{self.name} version {number} was judged against "
                f"{f'version {judged}' if judged else 'no champion'}, and now "
                f"{f'version {champion} is' if champion else 'there is none'}; judge it anew with "
                f"`python -m pipelines.gate --task {self.task}`"
            )

    def _move(self, event: Event) -> None:
        """Write the trail, then move `champion`, and `previous` after it."""
        taken = [int(key[len(AUDIT) :][:5]) for key in self._model().tags if key.startswith(AUDIT)]
        # What another working copy writes at the same time must not take this entry's place.
        key = f"{AUDIT}{max(taken, default=0) + 1:05d}-{uuid4().hex[:8]}"
        self.client.set_registered_model_tag(self.name, key, entry(event))
        self.client.set_registered_model_alias(self.name, "champion", str(event.after))
        self._catch_up()

    def _catch_up(self) -> None:
        """Note that there is a champion, and put `previous` on the version that it displaced."""
        aliases = self.aliases()
        champion, now = aliases.get("champion"), aliases.get("previous")
        if champion is None:
            return
        if CROWNED not in self._model().tags:
            self.client.set_registered_model_tag(self.name, CROWNED, "true")
        if (wanted := self.before(champion)) == now:
            return
        if wanted is None:
            self.client.delete_registered_model_alias(self.name, "previous")
        else:
            self.client.set_registered_model_alias(self.name, "previous", str(wanted))

    def _tag(self, number: int, key: str, value: str) -> None:
        self.client.set_model_version_tag(self.name, str(number), key, value)

    def _model(self) -> Any:
        from mlflow.entities.model_registry import RegisteredModel
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return RegisteredModel(self.name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One move at a time, as far as this working copy goes."""
        path = Path("reports/gate", f".{self.task}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def about(name: str) -> str:
    """Return what a registered model's own page says above its versions."""
    return (
        f"The model that `models:/{name}@champion` loads. A version's page is its model card with "
        "the gates that it had to meet. `grimace.audit.*` are all moves of the champion, one "
        f"tag each; `python -m flows.promote --show --task {name.removeprefix('grimace-')}` "
        "prints them."
    )


def entry(event: Event) -> str:
    """Return an event as the audit trail keeps it; what is too long for a tag is cut short."""
    for length in (1000, 500, 200, 50):
        cut = [
            {name: text[:length] for name, text in override.items()} for override in event.overrides
        ]
        kept = event._replace(why=event.why[:length], overrides=cut)._asdict()
        if len(text := json.dumps(kept, ensure_ascii=False)) <= PAGE_LENGTH:
            return text
    raise GrimaceError(
        f"{len(event.overrides)} overrides are more than the audit trail can hold of one promotion"
    )


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a version but those of the gate and the list of these sums."""
    names = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    left_out = {FILES.as_posix(), *JUDGED}
    return {name: tracking.sha256(names[name]) for name in sorted({*names} - left_out)}


def digest(files: Mapping[str, str]) -> str:
    """Return one SHA-256 for files whose SHA-256 are given by name."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def whoami() -> str:
    """Return the user's name, for the audit trail."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def bytes_of(task: str) -> dict[str, str]:
    """Return the SHA-256 of a task's candidate, as "model.keras", and of all files of its bundles.

    Raises:
        GrimaceError: there is no candidate or there are no bundles.
    """
    model, bundles = Path("deploy/candidate", f"{task}.keras"), Path("deploy", task)
    if not model.is_file() or not bundles.is_dir():
        raise GrimaceError(f"{model} or {bundles} is missing; run `dvc repro export`")
    found = {
        path.relative_to(bundles).as_posix(): path
        for path in sorted(bundles.rglob("*"))
        if path.is_file()
    }
    if "model.keras" in found:
        raise GrimaceError(
            f"{found['model.keras']} is no part of a bundle, and has the name by which the model "
            "itself is known; remove it"
        )
    return {name: tracking.sha256(path) for name, path in {"model.keras": model, **found}.items()}


def _standing(task: TaskName, params: Params, against: int | None) -> str:
    """Return one SHA-256 for all that a verdict on what is here now rests on.

    That is candidate, reports and bounds; the store, whose password may change; and, of a
    candidate that was rejected, the champion it was held against.
    """
    verified = Path("reports/verify", task)
    reports = {
        path.name: tracking.sha256(path) for path in sorted(verified.glob("*")) if path.is_file()
    }
    store = re.sub(r"(?<=://)[^/]*@", "", tracking.address(params.tracking))
    rest = [params.gate.model_dump_json(), store, against]
    return digest(
        {**bytes_of(task), **{f"reports/{k}": v for k, v in reports.items()}, "": str(rest)}
    )


def is_settled(task: TaskName, params: Params) -> bool:
    """Whether what is here now was promoted or rejected already, as `settle` noted.

    What was promoted stays settled whoever is champion by now, or it would come back by itself
    after it was rolled back. What was rejected is settled as long as the champion stays.

    Raises:
        GrimaceError: it was rejected, and the store does not say who is champion.
    """
    note = _note(task)
    if not note.is_file():
        return False
    noted = note.read_text()
    if noted == _standing(task, params, None):
        return True
    champion = Registry(params.tracking, task).aliases().get("champion", 0)
    return noted == _standing(task, params, champion)


def settle(task: TaskName, params: Params, against: int | None) -> None:
    """Note that what is here now was promoted, or rejected `against` a version; 0 for none."""
    _note(task).write_text(_standing(task, params, against))


def _note(task: TaskName) -> Path:
    return Path("reports/gate", f"{task}.settled")
