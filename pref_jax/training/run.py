"""``launch/train.py``: from a config and a workdir to a trained, evaluated run."""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pref_jax import hosts
from pref_jax import mesh as meshes
from pref_jax.compilation import compile_program
from pref_jax.config import training_data
from pref_jax.data.batches import BatchPlan, Samples, Update, update_shapes
from pref_jax.data.segments import Form
from pref_jax.errors import InputError
from pref_jax.evaluation.predict import (
    Predictor,
    place_update,
)
from pref_jax.experiment import (
    Backbone,
    Experiment,
    find_backbone,
    judged_name,
    load_frozen,
    log_parts,
)
from pref_jax.memory import describe_use, shortage_explained
from pref_jax.training.checkpoints import Checkpoints
from pref_jax.training.goals import Goal, make_goal, read_data
from pref_jax.training.length_prior import fit_lengths
from pref_jax.training.loop import History, Limits, TrainingLoop
from pref_jax.training.optimizer import make_optimizer, make_schedule
from pref_jax.training.progress import StopSignals
from pref_jax.training.records import MetricLog, UnwrittenLog
from pref_jax.training.state import TrainState, abstract_state, make_create_state, merge_parameters
from pref_jax.training.step import abstract_update, make_train_step
from pref_jax.training.workdir import FREE_FIELDS, Workdir, bound_fields, describe_environment

logger = logging.getLogger(__name__)

_MOST_STEPS = 2**31 - 2  # the step counter is an int32


class CompiledStep:
    """The training step of an experiment, compiled once, ahead of the data.

    Attributes:
      abstract: shapes and shardings of the state.
      compilations: programs that the step needed: 1, unless it was traced again.
      compile_seconds: how long it took.
    """

    def __init__(self, experiment: Experiment, total_steps: int) -> None:
        config = experiment.config
        train = config.train
        self.schedule = make_schedule(
            train.schedule, train.learning_rate, train.warmup_steps, total_steps
        )
        head_rate = train.head_learning_rate
        if head_rate is None:
            head_rate = train.learning_rate
        self.optimizer = make_optimizer(
            self.schedule,
            weight_decay=train.weight_decay,
            head_ratio=head_rate / train.learning_rate,
            layer_decay=train.layer_decay,
            num_layers=experiment.backbone.architecture.num_layers,
        )
        mesh = experiment.mesh
        scalar = meshes.replicated(mesh)
        trainable, self._abstract_frozen = experiment.split(experiment.abstract_params)
        self.abstract = abstract_state(
            trainable,
            self.optimizer,
            loss_scaling=experiment.precision.loss_scaling,
            averaging=train.ema > 0,
            scalar_sharding=scalar,
        )
        samples = train.batch_size * (2 if config.data.swap == "both" else 1)
        shapes = update_shapes(
            experiment.geometry, samples, meshes.batch_shards(mesh), experiment.microbatch_size
        )
        self._abstract_update = abstract_update(
            shapes, experiment.geometry, meshes.batch_sharding(mesh, 1), scalar
        )
        self.compilations, self.compile_seconds = 0, 0.0
        step = make_train_step(
            experiment.model,
            self.optimizer,
            self.schedule,
            clip_norm=train.clip_norm,
            average_decay=train.ema,
            task=experiment.task,
        )

        def counted(state: TrainState, frozen: Any, update: Update) -> Any:
            self.compilations += 1
            return step(state, frozen, update)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        # Replicated, so that every host can read them.
        self._function = jax.jit(counted, donate_argnums=0, out_shardings=(shardings, scalar))
        # What step and first state follow from beside the shapes of their arguments.
        self._identity = (
            experiment.model,
            train.to_dict(),
            total_steps,
            None if experiment.properties is None else len(experiment.properties.ratings),
            config.data.soft_labels is None,
        )
        self._compiled: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to compile in the background, while the host reads and tokenises."""
        self._thread = threading.Thread(target=self._compile, name="compile", daemon=True)
        self._thread.start()

    def _compile(self) -> None:
        started = time.monotonic()
        try:
            self._compiled = compile_program(
                self._function, self.abstract_arguments, ("train", *self._identity)
            )
            self.compilations = self.compilations or 1  # where it was found compiled
        except BaseException as error:  # handed to the thread that asks for the result
            self._error = error
        self.compile_seconds = time.monotonic() - started

    def create_state(self, trainable: Any) -> TrainState:
        """The state before the first update; it has its own copy of the parameters."""
        create = make_create_state(self.optimizer, self.abstract)
        program = compile_program(create, (self.abstract.params,), ("state", *self._identity))
        return program(trainable)

    @property
    def abstract_arguments(self) -> tuple[Any, Any, Any]:
        """Shapes and shardings of ``(state, frozen, update)``."""
        return self.abstract, self._abstract_frozen, self._abstract_update

    @property
    def executable(self) -> Any:
        """The compiled function ``(state, frozen, update) -> (state, metrics)``."""
        if self._thread is None:
            self._compile()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._compiled


def count_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Updates of the whole run: the smaller of ``epochs`` and ``max_steps``."""
    wanted = config.train.epochs * steps_per_epoch
    if config.train.max_steps is not None:
        wanted = min(wanted, config.train.max_steps)
    if wanted > _MOST_STEPS:
        raise InputError(
            "--config.train.epochs",
            f"{config.train.epochs:g} epochs are more than {_MOST_STEPS:,} updates",
            "choose fewer epochs, or set train.max_steps",
        )
    # The tiny margin keeps 0.1 + 0.2 epochs from rounding up to one more update.
    return max(1, math.ceil(wanted - 1e-9))


def train(
    config: ConfigDict, workdir: Workdir, started: float, signals: StopSignals
) -> dict[str, Any]:
    """Trains, or goes on with, the run in ``workdir``.

    Args:
      config: checked config.
      workdir: held by this process.
      started: `time.monotonic` at the start of the process, from which ``max_hours`` counts.
      signals: say when to stop; they are told when there is something to save.

    Returns:
      What ``result.json`` holds; where the run was stopped by a signal, ``stopped`` and ``steps``.

    Raises:
      InputError: anything about config, data or weights.
      RunError: the run failed on its way.
      Stopped: a signal came before the first update, or after the last evaluation.
    """
    path = workdir.path
    data = read_data(config)
    backbone = find_backbone(config, data.train)
    experiment = Experiment(config, backbone)
    goal = make_goal(experiment, data)
    _agree(config, goal, backbone)
    signals.check()
    steps_per_epoch = -(-len(goal.train_numbers) // config.train.batch_size)
    total_steps = count_steps(config, steps_per_epoch)
    # A new folder gets no config of weights that turn out to be broken or of another model, nor of
    # an input that the tokenizer does not allow, so that the corrected command works in it.
    _ = Form(experiment.layout, experiment.tokenizer)
    new = hosts.on_leader("new run", lambda: not workdir.config_path.exists())
    base = experiment.load_base() if new else None

    def settle() -> dict[str, Any] | None:
        # Data and weights may have moved; their hashes are compared instead.
        workdir.settle_config(config.to_dict(), free=(*FREE_FIELDS, *_PLACES))
        experiment.write_model(path, goal.digests)
        environment = describe_environment(jax.devices(), process_count=hosts.count())
        workdir.write_environment(environment)
        return workdir.read_result()

    result = hosts.on_leader("settled run", settle)
    if result is not None and result.get("steps") == total_steps:
        logger.info("the run in %s is finished: %d updates", path, total_steps)
        return result

    log_parts(experiment)
    with shortage_explained(experiment, "train"):
        result = _run(experiment, goal, workdir, started, signals, base, total_steps)
    if hosts.is_leader() and "best_step" in result:
        workdir.write_result(result)
    return result


def _run(
    experiment: Experiment,
    goal: Goal,
    workdir: Workdir,
    started: float,
    signals: StopSignals,
    base: Any,
    total_steps: int,
) -> dict[str, Any]:
    """Updates and evaluations of `train`, which says what the arguments and the result are."""
    config, path = experiment.config, workdir.path
    compiled = CompiledStep(experiment, total_steps)
    compiled.start()
    samples, valid_samples = goal.make_samples()
    plan = make_plan(experiment, samples, goal.train_numbers)
    _warn_about_schedule(config, total_steps)
    _warn_about_idle_devices(plan)
    goal.fit_baselines(path)

    abstract = compiled.abstract
    executable = compiled.executable
    signals.check()
    logger.info(
        "compiled the update in %.1f s (compilations: %d)",
        compiled.compile_seconds,
        compiled.compilations,
    )
    predictor = experiment.make_predictor()
    with (
        Checkpoints(
            workdir.checkpoints_path, keep=config.checkpoint.keep, mirror=workdir.mirror
        ) as checkpoints,
        (
            MetricLog(path, tensorboard=config.logging.tensorboard)
            if hosts.is_leader()
            else UnwrittenLog()
        ) as metrics,
    ):
        # Resume; else start from the base. Nothing of a base is read where a checkpoint has it.
        restored = checkpoints.restore_latest(abstract)
        evaluated = True
        if restored is not None:
            step, state, info = restored
            history, evaluated = History.read(info), info["valid_loss"] is not None
            frozen = load_frozen(experiment)
            logger.info("resumed %s at update %d of %d", path, step, total_steps)
        else:
            step, history = 0, History()
            params = experiment.initial_params(base)
            if config.train.fit_lengths and experiment.is_told_lengths:
                params = fit_lengths(experiment, params, samples, goal.train_numbers)
            trainable, frozen = experiment.split(params)
            del params
            state = compiled.create_state(trainable)
            del trainable  # the state has its own copy
        del base
        signals.saving = True
        signals.check()
        metrics.drop_after(step, evaluated=evaluated)
        evaluator = _Evaluator(predictor, goal, valid_samples, frozen)
        hours = config.train.max_hours
        loop = TrainingLoop(
            train_step=lambda state, update: executable(state, frozen, update),
            place=lambda update: place_update(update, experiment.mesh),
            evaluate=evaluator,
            plan=plan,
            checkpoints=checkpoints,
            metrics=metrics,
            limits=Limits(
                total_steps=total_steps,
                eval_every=config.eval.every_steps,
                checkpoint_every=config.checkpoint.every_steps,
                log_every=config.logging.every_steps,
                deadline=None if hours is None else started + hours * 3600.0,
                valid_rows=len(goal.valid_numbers),
            ),
            describe_rows=goal.describe,
            describe_memory=lambda: describe_use(experiment.mesh.local_devices[0]),
        )
        state, stopped = loop.run(state, step, history, signals, evaluated=evaluated)
        steps = int(state.step)
        if stopped not in (None, "max_hours"):
            logger.info(
                "stopped by %s and saved at update %d of %d; the same command goes on",
                stopped,
                steps,
                total_steps,
            )
            return {"steps": steps, "stopped": stopped}
        signals.saving = False
        best = history.best_step
        if best != evaluator.step:
            kept = judged_name(config)
            restored_state, _ = checkpoints.restore(best, {kept: abstract.judged})
            evaluator.score(restored_state[kept], best, lambda _: signals.check())
    assert evaluator.logits is not None
    logger.info("%s", describe_use(experiment.mesh.local_devices[0]))
    # All hosts compute the same here, and the leader writes.
    return {
        "steps": steps,
        "best_step": history.best_step,
        "stopped": stopped,
        **goal.conclude(path, evaluator.logits),
        "train_rows": len(goal.train_numbers),
        "rows_per_second": history.rows / max(history.train_seconds, 1e-9),
        "train_seconds": history.train_seconds,
        "compilations": {"train": compiled.compilations, "predict": predictor.compilations},
    }


# Where things lie, which may differ between hosts; their content may not.
_PLACES = (
    "data.train",
    "data.valid",
    "data.annotations",
    "data.properties",
    "data.soft_labels",
    "model.pretrained",
)
_OWN = ("logging", "train.max_hours")  # the leader's counts, or the first to be over


def _agree(config: ConfigDict, goal: Goal, backbone: Backbone) -> None:
    """Refuses hosts whose configs, data or weights would not make one run."""
    fields = bound_fields(config.to_dict(), (*_PLACES, *_OWN))
    hosts.agree("--config", fields, "start the same command on every host")
    hosts.agree(
        training_data(config),
        {f"data.{name}": digest for name, digest in goal.digests.items()},
        "give every host the same files",
    )
    identity = {name: value for name, value in backbone.base.items() if name != "source"}
    hosts.agree(
        "--config.model.pretrained",
        {"base": identity, "architecture": dataclasses.asdict(backbone.architecture)},
        "give every host the same weights",
    )


def make_plan(experiment: Experiment, samples: Samples, rows: np.ndarray) -> BatchPlan:
    """The batch plan of a config."""
    config = experiment.config
    plan = BatchPlan(
        samples=samples,
        rows=rows,
        batch_size=config.train.batch_size,
        seed=config.seed,
        swap=config.data.swap,
        geometry=experiment.geometry,
        shards=meshes.batch_shards(experiment.mesh),
        microbatch_size=experiment.microbatch_size,
    )
    return dataclasses.replace(plan, held=meshes.held(experiment.mesh, plan.shapes()))


class _Evaluator:
    """Scores the held-out samples; remembers the last logits, which are often the best ones."""

    def __init__(self, predictor: Predictor, goal: Goal, samples: Samples, frozen: Any) -> None:
        self._predictor, self._goal, self._samples = predictor, goal, samples
        self._frozen = frozen
        self.step = -1
        self.logits: np.ndarray | None = None

    def __call__(self, state: TrainState, report: Callable[[int], None]) -> Mapping[str, float]:
        return self._goal.measure(self.score(state.judged, int(state.step), report))

    def score(self, params: Any, step: int, report: Callable[[int], None]) -> np.ndarray:
        """Logits of the held-out samples; ``report`` is called after every batch."""
        merged = merge_parameters(params, self._frozen)
        self.logits = self._predictor.logits(
            merged, self._samples, self._goal.valid_numbers, report=report
        )
        self.step = step
        return self.logits


def _warn_about_idle_devices(plan: BatchPlan) -> None:
    rows = plan.batch_size * (2 if plan.swap == "both" else 1)
    units = min(units for _, units in plan.shapes())
    if rows < units:
        logger.warning(
            "an update has %d rows and one pass over all devices has room for %d packed sequences: "
            "most of it is padding; raise train.batch_size, or lower train.microbatch_size",
            rows,
            units,
        )


def _warn_about_schedule(config: ConfigDict, total_steps: int) -> None:
    warmup = config.train.warmup_steps
    if warmup >= total_steps:
        logger.warning(
            "train.warmup_steps=%d and the run has %d updates: the peak learning rate is never "
            "reached, the last update is at %.3g of %.3g",
            warmup,
            total_steps,
            config.train.learning_rate * (total_steps - 1) / warmup,
            config.train.learning_rate,
        )
