"""Every setting of every stage, as frozen pydantic models, and where runs live. Imports neither torch nor Ray.

`recipe.py` reads them from a file. The resolved recipe is written into the run folder as `config.json`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tdro_ray.errors import nearest

Measure = Literal["ratio", "official", "excess", "plain", "log_ratio"]
MEASURE_OPTIONS: dict[Measure, tuple[str, ...]] = {  # of dro/measures.py, here so that a wrong one is refused at load
    "ratio": ("floor", "smooth", "smooth_both", "over", "row_clip"),
    "official": ("p_norm", "cutoff", "interleaved"),
    "excess": ("clip_at", "normalise", "smooth"),
    "plain": (),
    "log_ratio": ("floor", "smooth"),
}
Backend = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
ExportFormat = Literal["hf", "lora", "onnx"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EnvironmentSettings(Settings):
    """The installed Python environment as a source of retrieval tasks."""

    max_rows: int = Field(2000, ge=1)  # training rows per task
    test_queries: int = Field(150, ge=1)  # held-out queries per task
    test_corpus: int = Field(1000, ge=1)  # passages per task that the test queries are searched in, at most
    max_files: int = Field(3000, ge=1)  # Python files parsed, a deterministic sample


class TaskOverride(Settings):
    """Per-task facts that the files do not carry; None keeps what the source says."""

    symmetric: bool | None = None  # query and passage are of one kind
    query_prompt: str | None = None  # instruction before a query
    in_batch: bool | None = None  # other rows' passages are negatives in stages 0 and 2
    temperature: float | None = None  # tau of this task
    language: str | None = None  # ISO 639-1 code, for reports
    licence: str | None = None  # for reports and model cards
    query_length: int | None = Field(None, ge=4)  # tokens of a query, EOS included; at most model.query_length
    passage_length: int | None = Field(None, ge=4)  # tokens of a passage, EOS included; at most model.passage_length


class CleanSettings(Settings):
    """Training queries that repeat a test query or each other; character trigrams decide, in any script."""

    threshold: float = Field(0.9, ge=0.8, le=1)  # Jaccard similarity of two queries' trigrams from which they are one
    contaminated: Literal["drop", "keep", "fail"] = "drop"  # rows whose query is near a test or dev query of any task
    near_duplicates: Literal["drop", "keep", "report"] = "report"  # rows near an earlier row of their task
    across_tasks: Literal["drop", "keep", "report"] = "report"  # rows near a row of a task with fewer rows


class PolicySettings(Settings):
    """What ingest does with rows that contradict themselves; `fail` stops at the first. The audit counts what is kept."""

    duplicated_id: Literal["drop", "keep", "fail"] = "keep"  # a row whose id an earlier row of the task has
    docid_with_two_texts: Literal["drop", "keep", "fail"] = "keep"  # a row with a passage whose docid had another text
    positive_in_negatives: Literal["drop", "fail"] = "drop"  # such a negative; kept it would teach the opposite
    query_is_passage: Literal["drop", "keep", "fail"] = "keep"  # a row whose query is one of its positives


class DataSettings(Settings):
    """Where collections come from and where the collection store lives."""

    store: Path | None = None  # folder of the collection store; None: <run folder>/store
    # "environment", task folders or files, folders of task folders, URLs of these (s3://…), hub datasets (hf:org/name)
    sources: tuple[str, ...] = ("environment",)
    max_reject_share: float = Field(0.001, ge=0, le=1)  # of a task's input lines
    dev_queries: int = Field(50, ge=0)  # per task, held out from training for Tune's objective
    dev_corpus: int = Field(1000, ge=1)  # passages per task that dev queries are searched in
    tasks: dict[str, TaskOverride] = {}  # overrides by task name
    environment: EnvironmentSettings = EnvironmentSettings()
    policies: PolicySettings = PolicySettings()
    clean: CleanSettings = CleanSettings()

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("sources"), str):
            data = {**data, "sources": (data["sources"],)}
        return data


class RescoreSettings(Settings):
    """A cross-encoder that scores what mining found; margins and distillation then use its scores."""

    model: str  # folder or Hub id of a sequence classifier with one output
    length: int = Field(512, ge=8)  # tokens of query and passage together, at most
    sigmoid: bool = False  # scores as probabilities rather than the model's raw output
    batch_tokens: int = Field(16384, ge=16)  # padded tokens per forward


class MineSettings(Settings):
    """Hard-negative mining."""

    method: Literal["bm25", "encoder"] = "bm25"
    model: str = ""  # of the encoder: a model folder, a Hub id, or "reference", the run's own once it is trained
    num_negatives: int = Field(7, ge=1)  # wanted per row, given ones counted
    first_rank: int = Field(2, ge=1)  # ranks above this are left out, 1 is the best hit
    last_rank: int = Field(30, ge=1)  # search depth
    # Under an encoder or `rescore`: a negative scores below the positive by this at least,
    margin_absolute: float | None = Field(None, ge=0)
    margin_relative: float | None = Field(0.95, gt=0, le=1)  # and at most this share of the positive's score
    rescore: RescoreSettings | None = None  # score what was found by a cross-encoder
    seed: int | None = None  # of what is sampled among the ranks; None takes the run's

    @model_validator(mode="after")
    def _has_model(self) -> MineSettings:
        if self.method == "encoder" and not self.model:
            raise ValueError("mine.method encoder needs mine.model: a model folder, a Hub id, or reference")
        if self.method == "bm25" and self.model:
            raise ValueError(f"mine.model {self.model!r} has no effect under bm25: set mine.method=encoder")
        return self


class TinyModel(Settings):
    """A Qwen2 built from scratch; its byte-level BPE is trained on the collections."""

    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 512
    vocab_size: int = 16384
    embedding_std: float = 1.0  # 1.0 makes the start lexical; the usual 0.02 learns nothing in a short run


class LoraSettings(Settings):
    """Low-rank adapters (peft)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None  # module names; None lets peft infer them


class ModelSettings(Settings):
    """The encoder, one for queries and passages."""

    name: str = "tiny"  # "tiny", a Hugging Face model folder, or a Hub id
    pooling: Literal["last", "mean", "cls"] = "last"
    instructions: bool = (
        True  # put each task's prompt before its queries; a small mean-pooling model does better without
    )
    query_length: int = Field(128, ge=4)  # tokens, EOS included
    passage_length: int = Field(512, ge=4)  # tokens, EOS included
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    packing: bool | Literal["auto"] = (
        "auto"  # sequences end to end, no padding; auto: where the GPU has a kernel for it (bfloat16)
    )
    compile: bool = False  # torch.compile of each transformer block; pays on a GPU, in long runs
    lora: LoraSettings | None = None
    tiny: TinyModel = TinyModel()


class TrainSettings(Settings):
    """One training run (stages 0 and 2; stage 1 adds to it)."""

    steps: int = Field(1000, ge=1)  # optimiser steps
    batch_size: int = Field(2048, ge=1)  # queries per step, over all workers
    num_negatives: int = Field(1, ge=0)  # hard negatives per query
    temperature: float = Field(0.002, gt=0)  # tau in s = cos / tau
    symmetric: bool = False  # stages 0 and 2, in-batch tasks: mean of query -> passages and positive -> queries
    distill: float = Field(0.0, ge=0)  # stages 0 and 2: weight of KL(teacher || student) over a row's scored passages
    distill_temperature: float = Field(1.0, gt=0)  # T that the teacher's scores are divided by
    learning_rate: float = Field(1e-4, gt=0)  # peak
    warmup_steps: int = Field(100, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # cosine ends at this share of the peak
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)  # 2-norm clip of the whole gradient
    token_budget: int = Field(16384, ge=16)  # padded tokens per forward; larger batches run in chunks
    checkpoint_every: int = Field(100, ge=1)  # steps
    log_every: int = Field(10, ge=1)  # steps
    group_dro: float = Field(
        0.0, ge=0
    )  # eta of online Group DRO: each task's loss is scaled by a learned weight; 0: off
    skip_nonfinite: int = Field(0, ge=0)  # steps without an update, because their loss was NaN or infinite, at most


class OptimizeSettings(TrainSettings):
    """Stage 1: the proxy and the task weights."""

    num_negatives: int = Field(7, ge=0)
    measure: Measure = "ratio"
    measure_options: dict[str, float | str | bool | None] = {}  # named options of the measure, see dro/measures.py
    eta: float = Field(0.02, gt=0)  # step size on log alpha
    eta_schedule: Literal["constant", "linear", "cosine"] = "constant"  # from eta down to 0
    hold: float = Field(0.0, ge=0, lt=1)  # share of the steps before alpha first moves
    momentum: float = Field(0.0, ge=0, lt=1)  # on the clipped signal
    clip: float = Field(1.0, gt=0)  # 2-norm of the signal vector above which it is scaled down
    ema: float = Field(0.1, gt=0, le=1)
    floor: float = Field(0.0, ge=0, lt=1)  # DoReMi smoothing: alpha = (1 - floor) alpha + floor / G
    absent: Literal["zero", "carry"] = "carry"  # signal of a task that the batch did not hold
    group_rows: int = Field(512, ge=1)  # rows over which `official` normalises
    rows: Literal["seen", "heldout", "crossfit"] = "seen"  # whose losses make the signal, see DESIGN.md
    folds: int = Field(
        5, ge=2
    )  # heldout: 1 / folds of each task is kept from reference and proxy; crossfit: references
    start: float = Field(
        0.0, ge=0, lt=1
    )  # the proxy starts from the reference at this share of its steps; 0: untrained
    size_c: float = Field(0.0, ge=0)  # nats; Group DRO's adjustment C / sqrt(task rows), added to the signal
    tolerance: float = Field(0.0, ge=0, lt=1)  # stop once less of the weight than this moves between windows; 0: never
    window: int = Field(50, ge=1)  # updates in a window of `tolerance`
    tail: float = Field(0.5, gt=0, le=1)  # share of the updates, the last ones, whose mean is the weight file `tail`
    top_percent: tuple[int, ...] = (70,)  # selection files to write, percent of tasks kept
    top_rows: tuple[int, ...] = ()  # the same, percent of all rows kept
    top_tokens: tuple[int, ...] = ()  # the same, percent of all tokens kept

    @model_validator(mode="after")
    def _percentages(self) -> OptimizeSettings:
        for name in ("top_percent", "top_rows", "top_tokens"):
            if any(not 0 < percent <= 100 for percent in getattr(self, name)):
                raise ValueError(f"{name} must hold percentages above 0 and up to 100, it holds {getattr(self, name)}")
        return self


RivalName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # names folders; a dot would name a weight file


class RivalSettings(Settings):
    """A mixture to compare with: how task weights are found, and how fine-tuning uses them."""

    optimize: dict[str, Any] = {}  # a stage 1 of its own, under these changes to the recipe's `optimize`
    power: float | None = None  # no stage 1: weights in proportion to rows ** power (0: uniform, 1: proportional)
    weights: str = "current"  # which file of the stage 1
    use: Literal["sampling", "loss"] = "sampling"  # weights set how often a task is drawn, or scale its loss
    finetune: dict[str, Any] = {}  # changes to the recipe's `finetune`

    @model_validator(mode="after")
    def _one_way(self) -> RivalSettings:
        if self.optimize and self.power is not None:
            raise ValueError("a rival takes its weights from `optimize` or from `power`, not from both")
        OptimizeSettings.model_validate(self.optimize)
        TrainSettings.model_validate(self.finetune)
        return self


class ScaleSettings(Settings):
    """How many workers, and what each asks of Ray."""

    # 0: train and encode in the command's own process, quickest for small models; [fewest, most]: training takes as
    # many as there are, and goes on with others where that changes
    num_workers: int | tuple[int, int] = 2
    use_gpu: bool = False
    cpus_per_worker: float = Field(0.5, gt=0)  # below 1 so that Ray Data is never starved on a small machine
    cpus_per_data_task: float = Field(0.25, gt=0)
    backend: Backend = "ddp"  # copies on every worker, FSDP2 shards, or DeepSpeed ZeRO
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to host memory; the zero backends only
    deepspeed: dict[str, Any] = {}  # merged over the DeepSpeed configuration that the settings make
    max_failures: int = Field(0, ge=-1)  # restarts of a failed worker group; -1 for ever
    keep_checkpoints: int = Field(1, ge=1)  # of a training run, the newest
    checkpoint_minutes: float = Field(0.0, ge=0)  # a checkpoint also after so long, beside `checkpoint_every`; 0: never
    storage: str = ""  # URL that checkpoints are kept under, e.g. s3://bucket/runs; "" takes the run folder
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not all(type(part) is int for part in parts):
            raise ValueError("a number of workers, or two: [fewest, most]")
        if len(parts) == 1 and not isinstance(value, (list, tuple)) and value >= 0:
            return value
        if len(parts) == 2 and 1 <= parts[0] <= parts[1]:
            return tuple(parts)
        raise ValueError("it must be 0 or more, or [fewest, most] with 1 <= fewest <= most")

    @model_validator(mode="after")
    def _backend_takes(self) -> ScaleSettings:
        if self.storage and "://" not in self.storage:
            raise ValueError(f"scale.storage must be a URL such as s3://bucket/runs, it is {self.storage!r}")
        if self.storage and self.num_workers == 0:
            raise ValueError(
                "scale.storage has no effect with scale.num_workers 0, which keeps checkpoints in the run folder"
            )
        if not self.backend.startswith("zero") and (self.offload != "none" or self.deepspeed):
            raise ValueError(
                f"scale.offload and scale.deepspeed have no effect under backend {self.backend}: set scale.backend to zero1, zero2 or zero3"
            )
        if self.offload == "parameters" and self.backend != "zero3":
            raise ValueError(
                f"scale.offload=parameters needs scale.backend=zero3, it is {self.backend}; optimizer works"
            )
        return self


class EvaluateSettings(Settings):
    """Retrieval on each task's held-out test."""

    ndcg_at: int = 10
    recall_at: int = 100
    batch_tokens: int = 16384  # padded tokens per forward while encoding
    extra_tests: tuple[str, ...] = ()  # BEIR, MIRACL or Mr.TyDi folders or their URLs, beside the tasks' own tests


class IndexSettings(Settings):
    """FAISS index over the store's passages."""

    factory: str = "Flat"  # any faiss.index_factory string, or auto (by size); inner product on unit vectors
    target_recall: float = Field(0.98, gt=0, le=1)  # recall@10 that the search is widened for, where it is not exact
    min_recall: float = Field(0.0, ge=0, le=1)  # recall@10 below which a build or a merge fails
    model: str = ""  # name of the evaluated model to index with; "" takes the best mean nDCG@10
    tasks: tuple[str, ...] = ()  # tasks whose passages are indexed; () takes all
    device: Literal["cpu", "cuda"] = "cpu"  # where FAISS builds and `tdro serve` searches; cuda: Flat and IVF kinds


class ServeSettings(Settings):
    """The HTTP service that `tdro serve` and the last step of `tdro run` start."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0 takes a free one
    proxy: Literal["auto", "ray", "haproxy"] = (
        "auto"  # takes HTTP in; auto: as RAY_SERVE_ENABLE_HA_PROXY says, else Ray's
    )
    num_replicas: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"  # of the embedder; cuda takes one GPU a replica
    backend: Literal["torch", "onnx"] = "torch"  # onnx: onnxruntime on the CPU; the model is exported for it once
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of torch's matrix products; auto: bfloat16 where fast and exact
    )
    compile: bool = False  # torch.compile of the encoder; a start takes half a minute longer and needs a C++ compiler
    threads: int = Field(0, ge=0)  # of a replica's forwards and searches; 0 shares the node's CPUs among the replicas
    cache_mb: int = Field(64, ge=0)  # MiB per replica of vectors of texts seen before; 0 keeps none
    queries: tuple[str, ...] = ()  # sent through HTTP at the end of `tdro run`
    k: int = Field(3, ge=1)  # hits printed for each


class LoggingSettings(Settings):
    """Dashboards that training metrics go to besides `metrics.jsonl`, at every `log_every`-th step."""

    tensorboard: bool = True  # event files under <run folder>/tensorboard/<stage>, where tensorboard is installed
    wandb: str = ""  # project of Weights & Biases; "" sends nothing
    mlflow: str = ""  # experiment of MLflow, on the server of MLFLOW_TRACKING_URI; "" sends nothing


class TuneSettings(Settings):
    """Search over stage 1. A trial: stage 1, a short fine-tuning with its weights, nDCG on the dev queries."""

    trials: int = Field(12, ge=1)  # the recipe's own setting, which is the first one, counted
    search: Literal["random", "optuna"] = "random"
    eta: tuple[float, float] = (2e-3, 2e-1)  # log-uniform
    temperature: tuple[float, float] = (0.01, 0.1)  # log-uniform, the proxy's tau
    measures: tuple[Measure, ...] = Field(("ratio", "excess"), min_length=1)
    choices: dict[str, tuple[Any, ...]] = {}  # further settings of `optimize` to choose from, e.g. {clip: [0.3, 1.0]}
    optimize_steps: int = Field(40, ge=1)  # of stage 1 in a trial; warm-up is shortened in proportion
    finetune_steps: int = Field(40, ge=1)  # of the fine-tuning in a trial
    objective: Literal["mean", "worst"] = "mean"  # over tasks, of nDCG on the dev queries
    evaluations: int = Field(1, ge=1)  # of a trial's fine-tuning, evenly spread; the last one is the objective
    scheduler: Literal["none", "asha", "median"] = "none"  # stops weak trials between their evaluations
    confirm: int = Field(0, ge=0)  # further seeds on which the best trial is compared with the recipe's own setting
    concurrent: int = Field(0, ge=0)  # trials at once; 0: as many as fit
    cpus_per_trial: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _searchable(self) -> TuneSettings:
        for name, (low, high) in {"eta": self.eta, "temperature": self.temperature}.items():
            if not 0 < low <= high:
                raise ValueError(f"tune.{name} must be two numbers above 0, the smaller first")
        if self.confirm == 1:
            raise ValueError("tune.confirm 1 gives no interval: set it to 0, or to at least 2 seeds")
        if self.scheduler != "none" and self.evaluations < 2:
            raise ValueError(
                f"tune.scheduler {self.scheduler} needs tune.evaluations of at least 2: it stops trials between them"
            )
        fixed = {
            "steps",
            "batch_size",
            "num_negatives",
            "rows",
            "folds",
            "start",
            "group_dro",
        }  # the scores are of these
        for name, values in self.choices.items():
            if name not in OptimizeSettings.model_fields or name in {"eta", "temperature", "measure", *fixed}:
                free = sorted({*OptimizeSettings.model_fields} - {"eta", "temperature", "measure", *fixed})
                raise ValueError(f"tune.choices: {name!r} cannot be chosen.{nearest(name, free)}")
            if not values:
                raise ValueError(f"tune.choices.{name} is empty: list at least one value")
            for value in values:
                OptimizeSettings.model_validate({name: value})
        return self


class Recipe(Settings):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 42
    seeds: int = Field(1, ge=1)  # runs of everything from the base model on, with seeds seed, seed + 1, …
    data: DataSettings = DataSettings()
    mine: MineSettings = MineSettings()
    model: ModelSettings = ModelSettings()
    scale: ScaleSettings = ScaleSettings()
    reference: TrainSettings = TrainSettings()
    optimize: OptimizeSettings = OptimizeSettings()
    finetune: TrainSettings = TrainSettings()
    weights: tuple[str, ...] = ("current", "top70")  # learned weight files to fine-tune with
    compare: tuple[str, ...] = ()  # further mixtures: rivals by name, n^0.5, RIVAL.top70, or weight files
    rivals: dict[RivalName, RivalSettings] = {}  # mixtures of one's own for `compare`, beside the built-in ones
    max_repeats: float | None = Field(None, gt=0)  # passes over a task in fine-tuning; weight beyond goes to the others
    evaluate: EvaluateSettings = EvaluateSettings()
    index: IndexSettings = IndexSettings()
    serve: ServeSettings = ServeSettings()
    tune: TuneSettings = TuneSettings()
    logging: LoggingSettings = LoggingSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.optimize.num_negatives == 0:
            raise ValueError(
                "optimize.num_negatives must be at least 1: stage 1 has no in-batch negatives, its loss would be 0"
            )
        for name, settings in {
            "": self.optimize,
            **{n: changed(self.optimize, r.optimize) for n, r in self.rivals.items()},
        }.items():
            where = f"rivals.{name}.optimize" if name else "optimize"
            for option in settings.measure_options:
                valid = MEASURE_OPTIONS[settings.measure]
                if option not in valid:
                    raise ValueError(
                        f"{where}.measure_options: measure {settings.measure!r} has no option {option!r}.{nearest(option, valid)}"
                    )
        if self.optimize.group_dro or self.reference.group_dro:
            raise ValueError("group_dro is a way of fine-tuning: set finetune.group_dro, not that of another stage")
        if self.optimize.symmetric:
            raise ValueError("optimize.symmetric has no effect: stage 1 compares each row's own passages only")
        if self.optimize.distill:
            raise ValueError("optimize.distill has no effect: stage 1 learns from each row's contrastive loss only")
        if self.mine.last_rank < self.mine.first_rank:
            raise ValueError("mine.last_rank must not be below mine.first_rank")
        return self


def least_workers(scale: ScaleSettings) -> int:
    """Return how many workers a run needs, 0 where it has none beside the command's own process."""
    return scale.num_workers if isinstance(scale.num_workers, int) else scale.num_workers[0]


def most_workers(scale: ScaleSettings) -> int:
    """Return how many workers a run takes where there are enough."""
    return scale.num_workers if isinstance(scale.num_workers, int) else scale.num_workers[1]


def changed(own: OptimizeSettings, changes: dict[str, Any]) -> OptimizeSettings:
    """Return stage 1's settings under `changes`; options of the recipe's measure are not passed to another one."""
    merged = {**own.model_dump(), **changes}
    if merged["measure"] != own.measure and "measure_options" not in changes:
        merged["measure_options"] = {}
    return OptimizeSettings.model_validate(merged)


def mining_seed(recipe: Recipe) -> int:
    """Seed of what mining samples: the run's, unless the runs of several seeds share their negatives."""
    return recipe.seed if recipe.mine.seed is None else recipe.mine.seed


def mining_settings(mine: MineSettings) -> dict[str, Any]:
    """Settings that decide what mining finds, its seed aside; those of encoder and cross-encoder only where there is one."""
    unused = {"seed"}
    if mine.method == "bm25":
        unused |= {"model"} if mine.rescore else {"model", "margin_absolute", "margin_relative"}
    return mine.model_dump(mode="json", exclude=unused if mine.rescore else {*unused, "rescore"})


def runs_root() -> Path:
    """Folder of all run folders: `$TDRO_RUNS` (a Ray job sets it) or `runs` in the working directory."""
    return Path(os.environ.get("TDRO_RUNS") or "runs").resolve()


def run_folder(recipe: Recipe) -> Path:
    """Run folder of a recipe."""
    return runs_root() / recipe.name


def store_folder(recipe: Recipe) -> Path:
    """Collection store of a recipe: `data.store`, or `store` in its run folder."""
    return recipe.data.store.expanduser().resolve() if recipe.data.store else run_folder(recipe) / "store"
