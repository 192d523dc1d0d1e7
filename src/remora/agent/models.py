"""Which models a tenant may use, and getting them into a worker before the first request needs them.

Catalogue models are the operator's and run in the shared domain; what a tenant uploaded runs only in that tenant's own.
A model is loaded when it is first asked for, also after a restart of the agent: a session remembers what it loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from remora.agent import files
from remora.agent.cards import CatalogueEntry, ModelCard
from remora.agent.disk import DiskPool
from remora.agent.model_files import FORMATS, TORCHSCRIPT, as_declared, check_program, recognise
from remora.agent.operations import Operation, is_digest
from remora.agent.residency import Residency
from remora.agent.rules import UNBOUNDED, Terms
from remora.agent.sessions import Session, Sessions
from remora.agent.store import Store
from remora.agent.tickets import Plan
from remora.agent.tuning import Tuning
from remora.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    RemoraError,
    UnimplementedError,
)
from remora.workers.contract import SHARED, ModelSource, ModelSpec, Workers

SpecDone = Callable[[ModelSpec | RemoraError], None]


class Models:
    """The catalogue, and what is loaded or being loaded."""

    def __init__(
        self,
        catalogue: Mapping[str, CatalogueEntry],
        workers: Workers,
        store: Store,
        sessions: Sessions,
        disk: DiskPool,
        tuning: Tuning,
        residency: Residency,
    ) -> None:
        self._catalogue = catalogue
        self._workers = workers
        self._store = store
        self._sessions = sessions
        self._disk = disk
        #: What policy grants to a session.
        self.terms: Callable[[Session], Terms] = lambda _session: UNBOUNDED
        #: Called with how long a tenant's own model took to load, whether it could be or not.
        self.on_spent: Callable[[Session, float], None] = lambda _session, _used_s: None
        self.tuning = tuning
        self.residency = residency
        self._loaded: dict[tuple[str, str], ModelSpec] = {}
        #: Where models run, as far as is known: where the last one came to run.
        self._device = "cpu"
        self._waiting: dict[tuple[str, str], list[SpecDone]] = {}
        #: Uploads that are programs, while they are loaded: who may run them is asked at each run.
        self._programs: dict[tuple[str, str], ModelSource] = {}

    def domain_for(self, session: Session, model: str) -> str:
        """Return the trust domain in which the session may run the model: the catalogue's, or one it loaded.

        Raises:
            NotFoundError: no such model, or not loaded in this session.
            PermissionDeniedError: it is a program, and policy lets this caller run none.
        """
        domain = self.domain(session.tenant, model, self.terms(session))
        if domain != SHARED and model not in (session.models or ()):
            raise NotFoundError(f"{model} is not loaded in this session", fix="load it first")
        self._check_program((domain, model), session)
        return domain

    def _check_program(self, key: tuple[str, str], session: Session) -> None:
        """Ask policy anew: the model may be loaded for another of the tenant's callers, or by rules of yesterday."""
        program = self._programs.get(key)
        if program is not None:
            check_program(program, self.terms(session))

    def domain(self, tenant: str, model: str, terms: Terms | None = None) -> str:
        """Return the trust domain to which a model that the tenant may know of belongs.

        Args:
            terms: For naming the models that there are, without those that policy keeps from the caller.

        Raises:
            NotFoundError: no such model, or none that this tenant may know of.
        """
        if model in self._catalogue:
            return SHARED
        if is_digest(model) and self._store.owns(tenant, model):
            return tenant
        if is_digest(model):
            raise NotFoundError(f"there is no model {model}", fix="upload it and load it first")
        names = None
        if terms is not None:
            names = ", ".join(name for name in sorted(self._catalogue) if terms.allows("models", name)) or "empty"
        raise NotFoundError(
            f"there is no model {model!r}",
            fix=f"the catalogue is {names}; `remora models build` adds to it"
            if names
            else "ask for the list of models",
        )

    def device(self, domain: str, model: str) -> str:
        """Return the device on which a loaded model runs."""
        spec = self._loaded.get((domain, model))
        return spec.device if spec is not None else ""

    def loaded_specs(self) -> Mapping[tuple[str, str], ModelSpec]:
        """Return what is in the memory of workers, by trust domain and model."""
        return self._loaded

    def plan(self, domain: str, operation: Operation) -> Plan:
        """Return how a request for a loaded model is run, which is thereby used."""
        self.residency.used((domain, operation.model))
        return self.tuning.plan((domain, operation.model), operation)

    def lost(self, domain: str, model: str, reason: RemoraError, done: Callable[[], None]) -> None:
        """A job has found that its worker may not have the model any more: the next one asks for it again.

        Damaged bytes are forgotten before the caller hears of it, so that what it sends then is not taken for stored.
        """
        if self._drop((domain, model)):
            self.tuning.forget((domain, model))
            self.residency.forget([(domain, model)])
        if isinstance(reason, DataLossError) and domain != SHARED:
            self._store.open(domain, model, lambda _outcome: done())
        else:
            done()

    def loaded(self, domain: str, model: str) -> bool:
        """True if the model takes requests now."""
        return (domain, model) in self._loaded and not self.residency.leaving((domain, model))

    def ensure(self, session: Session, model: str, done: SpecDone, model_format: str = "") -> None:
        """Load the model into its domain's worker, if it is not there yet.

        Raises:
            NotFoundError: as `domain`.
        """
        domain = self.domain(session.tenant, model, self.terms(session))
        self.terms(session).check("models", model)
        key = (domain, model)
        self._check_program(key, session)
        spec = self._loaded.get(key)
        if spec is not None and not self.residency.leaving(key):
            done(spec)
            return
        if (waiting := self._waiting.get(key)) is not None:
            waiting.append(done)
            return
        self._waiting[key] = [done]
        entry = self._catalogue.get(model)
        if entry is not None:
            self._load_catalogue(key, entry)
        else:
            chosen = model_format or (session.models or {}).get(model, "")
            self._load_upload(key, chosen, session)

    def _load_catalogue(self, key: tuple[str, str], entry: CatalogueEntry) -> None:
        source = entry.source

        def verified(error: RemoraError | None) -> None:
            if error is not None:
                self._answer(key, error)
            else:
                self._load(key, source)

        def verify() -> None:
            files.ResourceFiles.verify(source.path, source.digest)

        try:
            self._disk.submit(source.digest, verify, verified)
        except RemoraError as error:
            self._answer(key, error)

    def _load_upload(self, key: tuple[str, str], model_format: str, session: Session) -> None:
        tenant, digest = key

        def opened(path: Path | RemoraError) -> None:
            if isinstance(path, RemoraError):
                self._answer(key, path)
                return
            try:
                source = ModelSource(digest, digest, path, model_format or recognise(path))
                check_program(source, self.terms(session))
            except RemoraError as error:
                self._answer(key, error)
                return
            if source.format == TORCHSCRIPT:
                self._programs[key] = source
            self._load(key, source, session)

        try:
            self._store.open(tenant, digest, opened)
        except RemoraError as error:
            self._answer(key, error)

    def _load(self, key: tuple[str, str], source: ModelSource, payer: Session | None = None) -> None:
        """Load a verified file as soon as there is room for it."""
        try:
            file_bytes = source.path.stat().st_size
        except OSError:
            file_bytes = 0  # whoever opens it says what is wrong
        size_bytes = self.tuning.memory_bytes(key, source.digest)
        size_bytes = size_bytes or self.residency.expected_bytes(self._device, file_bytes)
        try:
            self.residency.admit(
                key, self._device, size_bytes, partial(self._begin_load, key, source, payer), partial(self._answer, key)
            )
        except RemoraError as error:
            self._answer(key, error)

    def _begin_load(self, key: tuple[str, str], source: ModelSource, payer: Session | None) -> None:
        began_s = time.monotonic()

        def loaded(found: ModelSpec | RemoraError) -> None:
            if payer is not None:
                self.on_spent(payer, time.monotonic() - began_s)
            outcome = as_declared(source, found)
            if isinstance(outcome, ModelSpec):
                outcome = self._settle(key, source, outcome, time.monotonic() - began_s)
            if isinstance(outcome, RemoraError):
                self.residency.failed(key)
                if isinstance(found, ModelSpec):
                    self._workers.unload(*key)
            self._answer(key, outcome)
            self.residency.trim()

        self._workers.load(key[0], source, loaded)

    def _settle(
        self, key: tuple[str, str], source: ModelSource, spec: ModelSpec, load_s: float
    ) -> ModelSpec | RemoraError:
        """Take a model in that is in its worker's memory, or say why it cannot stay."""
        self._device = spec.device
        self.tuning.loaded(key, source, spec, load_s)
        size_bytes = max(spec.memory_bytes, self.tuning.memory_bytes(key, source.digest))
        try:
            self.residency.loaded(key, spec.device, size_bytes, load_s)
        except RemoraError as error:
            self.tuning.forget(key)
            return error
        return spec

    def evict(self, key: tuple[str, str]) -> None:
        """Unload an idle model; the next request for it loads it again."""
        if self._drop(key):
            self._workers.unload(*key)
            self.tuning.forget(key)

    def _drop(self, key: tuple[str, str]) -> bool:
        """Forget that a model is loaded; False if it was not."""
        self._programs.pop(key, None)
        return self._loaded.pop(key, None) is not None

    def _answer(self, key: tuple[str, str], outcome: ModelSpec | RemoraError) -> None:
        waiting = self._waiting.pop(key, [])
        if isinstance(outcome, ModelSpec):
            self._loaded[key] = outcome
        else:
            self._programs.pop(key, None)
        for done in waiting:
            done(outcome)

    def load(
        self, session: Session, model: str, model_format: str, done: Callable[[ModelCard | RemoraError], None]
    ) -> None:
        """Load a model for a session, which keeps its resource until the session unloads it or ends."""
        if model_format and model_format not in FORMATS:
            raise InvalidArgumentError(
                f"{model_format[:40]!r} is not a model format here", fix=f"use one of {', '.join(FORMATS)}"
            )
        self.domain(session.tenant, model, self.terms(session))
        self.terms(session).check("models", model)
        self._sessions.add_model(session, model, model_format)
        if is_digest(model):
            self._sessions.hold(session, model)

        def loaded(outcome: ModelSpec | RemoraError) -> None:
            if isinstance(outcome, RemoraError):
                if not session.ended:
                    self.unload(session, model)
                done(outcome)
            else:
                self._sessions.settle(noted)

        def noted(error: RemoraError | None) -> None:
            if error is not None:
                done(error)
                return
            try:
                done(self.card(session.tenant, model))
            except RemoraError as gone:  # evicted or detached meanwhile
                done(gone)

        self.ensure(session, model, loaded, model_format)

    def unload(self, session: Session, model: str) -> None:
        """Undo `load`; the worker gives the model up when no session of the tenant uses it. Twice is no error."""
        if self._sessions.remove_model(session, model) and is_digest(model):
            self._sessions.unhold(session, model)
            self._forget_unused(session.tenant, model)

    def session_ended(self, session: Session) -> None:
        """Unload what only this session used. Called when it is gone from the table."""
        for model in session.models or ():
            if is_digest(model):
                self._forget_unused(session.tenant, model)

    def _forget_unused(self, tenant: str, model: str) -> None:
        if not self._sessions.uses_model(tenant, model) and self._drop((tenant, model)):
            self._workers.unload(tenant, model)
            self.tuning.forget((tenant, model))
            self.residency.forget([(tenant, model)])

    def forget_domain(self, domain: str) -> None:
        """The domain's workers are gone."""
        self.tuning.forget_domain(domain)
        gone = [key for key in (*self._loaded, *self._waiting) if key[0] == domain]
        for key in gone:
            self._drop(key)
            self.tuning.forget(key)
        self.residency.forget(gone)

    def card(self, tenant: str, model: str) -> ModelCard:
        domain = self.domain(tenant, model)
        spec = self._loaded.get((domain, model))
        entry = self._catalogue.get(model)
        if entry is None:
            return ModelCard(model, spec.task if spec else "tensor", model, self._store.size(tenant, model), spec)
        card = ModelCard(model, entry.source.task, entry.source.digest, entry.info.size_bytes, spec)
        card.description, card.licence = entry.info.description, entry.info.licence
        card.inputs, card.outputs = card.inputs or entry.source.inputs, card.outputs or entry.source.outputs
        return card

    def cards(self, session: Session) -> list[ModelCard]:
        """Return the catalogue's models, then those that the session loaded; without what policy keeps from it."""
        own = [name for name in session.models or () if name not in self._catalogue]
        usable = [name for name in own if self._store.owns(session.tenant, name)]
        terms = self.terms(session)
        names = (*sorted(self._catalogue), *sorted(usable))
        return [self.card(session.tenant, name) for name in names if terms.allows("models", name)]

    def default_for(self, session: Session, task: str) -> str:
        """Return the catalogue's first model for a task that the session may use, for callers who name none (vAccel).

        Raises:
            UnimplementedError: there is none for the task.
            PermissionDeniedError: policy allows none of them.
        """
        fit = [name for name in sorted(self._catalogue) if self._catalogue[name].source.task == task]
        terms = self.terms(session)
        for name in fit:
            if terms.allows("models", name):
                return name
        if fit:
            terms.check("models", fit[0])
        raise UnimplementedError(
            f"no model for this operation in the catalogue: {task} has none",
            fix=f"add a manifest with task = '{task}' and its model (docs/models.md)",
        )
