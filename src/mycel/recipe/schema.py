"""What is to be done: one typed, frozen, hashable recipe for every job.

A recipe is read from TOML or built in Python, printed back as TOML, and hashed over its canonical JSON.
Sections are orthogonal: codec, pace, cohort, guards and fleet wrap any system and are never written into one.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model that every node holds."""

    base: str = Field("tiny", description="a built-in size, a local path, or a Hugging Face id")
    adapter: str = Field("", description="a run folder or PEFT folder whose adapter is the starting state")


class TrainableSpec(Section):
    """The named sub-state that is trained and travels."""

    kind: Literal["lora", "full", "prompt", "blocks"] = "lora"
    rank: Positive | list[Positive] = Field(16, description="LoRA rank, or one per party")
    scaling: Annotated[float, Field(gt=0)] = Field(2.0, description="alpha / rank, the same at every rank")
    targets: list[str] = Field(default=[], description="module names LoRA adapts; empty: every linear layer")
    length: Positive = Field(16, description="tokens of a soft prompt")
    blocks: list[Annotated[int, Field(ge=0)]] = Field(default=[], description="block indices; empty: all")


class Data(Section):
    """Whose examples, and how they are spread over parties."""

    source: str = Field(
        "python-library",
        description="built-in corpus, JSONL or Parquet file, folder of text, or Hugging Face id",
    )
    parties: str | list[str] = Field("by-domain", description="a partition, or one path per party")
    count: Positive = Field(6, description="how many parties a partition makes")
    examples: Positive = Field(400, description="training examples per party, at most")
    held_out: Positive = Field(48, description="held-out examples per party")
    max_length: Annotated[int, Field(ge=8)] = Field(128, description="tokens of prompt and response together")
    cleaning: list[str] = Field(
        default=[], description='done where the text lies, e.g. ["quality", "language(en)", "copies(0.8)", "masks"]'
    )
    pack: bool = Field(False, description="join documents end to end and cut rows of max_length, for pre-training")


class Training(Section):
    """What a party does at home."""

    batch_size: Positive = 8
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="gradient norm bound; 0: none")
    gradient: Literal["backpropagation", "zeroth-order"] = "backpropagation"
    objective: Literal["causal", "seq2seq"] = "causal"
    perturbation: Annotated[float, Field(gt=0)] = Field(1e-3, description="step of the two-point estimate")


class Rounds(Section):
    """How often nodes are asked, how long they work alone, and when their answers combine."""

    count: Positive = 8
    local_steps: Positive = 10
    pace: str = Field("synchronous", description='"synchronous", "buffered(K)" or "sequential"')
    cohort: Fraction = Field(1.0, description="share of the nodes asked in a round")
    quorum: Fraction = Field(1.0, description="share of the cohort that is enough once the deadline has passed")
    patience: Annotated[float, Field(gt=0)] = Field(3.0, description="how far beyond the usual a deadline lies")
    staleness: Annotated[float, Field(ge=0)] = Field(0.5, description="exponent that discounts late versions")
    evaluate_every: Positive = Field(1, description="rounds between evaluations at the parties")


class Wire(Section):
    """How tensors are encoded when they travel."""

    codec: str = Field("raw", description="what parties' answers are encoded with")
    brief_codec: str = Field("raw", description="what the coordinator's briefs are encoded with")
    error_feedback: bool = Field(False, description="keep what the codec lost and add it to the next answer")
    max_parcel: Positive = Field(1 << 31, description="largest frame accepted, in bytes")


class Guard(Section):
    """What protects what leaves."""

    clip_norm: Annotated[float, Field(ge=0)] = Field(0.0, description="bound on the norm of a party's update; 0: none")
    sums: Literal["plain", "masked", "sparsely-masked", "homomorphic", "enclave"] = Field(
        "plain",
        description="how answers are added up: in the open, under masks (on a sparse graph: cheaper), encrypted under "
        "a key that parties share, or inside an enclave (simulated: it protects nobody)",
    )
    staying: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.67, description="share of the asked parties that is enough to open a masked sum"
    )
    filter: str = Field("", description='what distrusts answers, e.g. "median" or "krum(0.2)"; empty: nothing')
    root: str = Field("", description="source of the coordinator's own examples, for the filter fltrust")
    private: Literal["", "user", "local", "example"] = Field(
        "", description="differential privacy: of parties by the coordinator, by themselves, or of single examples"
    )
    noise: Annotated[float, Field(ge=0)] = Field(0.0, description="noise's deviation over its sensitivity")
    epsilon: float = Field(0.0, description="instead of noise: the epsilon that the whole run may cost")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="odds with which epsilon may be exceeded")
    within: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of updates that adaptive clipping keeps whole; 0: the bound is fixed"
    )
    record_frames: bool = Field(
        False, description="keep every frame that crosses, so that `mycel audit` can look through their content"
    )
    replayable: bool = Field(False, description="noise from the recipe's seed: repeats to the bit, protects nobody")


class Threat(Section):
    """A drill: parties that lie, to see what a guard is worth."""

    attack: str = Field("", description='what liars do, e.g. "sign_flip" or "scale(10)"; empty: nobody lies')
    share: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="share of the parties that lie")


class FleetSpec(Section):
    """Which devices and links take part."""

    devices: str = Field("six-laptops", description="a built-in profile or a fleet.toml")


class Layout(Section):
    """How the ranks inside an island divide a model and its batches (`mycel run --nproc`)."""

    data: Positive = Field(1, description="ranks that share out the rows of a step and shard the weights (FSDP)")
    tensor: Positive = Field(1, description="ranks that divide every matrix")
    pipeline: Positive = Field(1, description="ranks that hold consecutive blocks")
    sequence: Positive = Field(1, description="ranks that divide every row's tokens")
    attention: Literal["gathered", "balanced"] = Field(
        "gathered", description="over a row's ranks: each gathers all keys, or they share out the work evenly"
    )
    micro_batches: Positive = Field(1, description="pieces of a data rank's rows, one after another")
    schedule: Literal["gpipe", "1f1b", "interleaved", "breadth_first", "zero_bubble", "zbv"] = Field(
        "gpipe", description="order of a pipeline's micro-batches"
    )
    chunks: Positive = Field(1, description="stages that a pipeline rank holds, far apart in the model; zbv takes 2")
    blocks: list[Positive] = Field(default=[], description="blocks of each pipeline stage; empty: as even as can be")
    recompute: bool = Field(False, description="drop activations on the way forward and compute them again")
    activations: list[Literal["keep", "selective", "recompute", "offload"]] = Field(
        default=[], description="what each block leaves for its way back, or one for all; empty: as recompute says"
    )
    activation_mib: Annotated[float, Field(ge=0)] = Field(
        0.0, description="memory for what a rank's blocks leave; the fastest mixture that fits is taken; 0: no limit"
    )
    offload_optimizer: bool = Field(False, description="the optimiser's memory lies in a file")
    codec: str = Field("", description="codec of the gradients that data ranks exchange; empty: none")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between checkpoints; 0: at the end")
    recovery: Literal["restart", "bamboo", "oobleck", "gemini"] = Field(
        "restart", description="when a rank dies: begin again from the disk, or go on in the processes that are left"
    )


class Engine(Section):
    """What carries parcels and runs the work."""

    kind: Literal["inprocess"] = "inprocess"
    workers: Annotated[int, Field(ge=-1)] = Field(-1, description="worker processes; 0: in this one; -1: every core")


_DIVISION = set(Layout.model_fields) - {"codec"}  # an island's division changes no result but by rounding


class Recipe(Section):
    """Everything a run needs to be repeated to the bit."""

    title: str = ""
    system: str = "fedavg"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    model: Model = Model()
    trainable: TrainableSpec = TrainableSpec()
    data: Data = Data()
    training: Training = Training()
    rounds: Rounds = Rounds()
    wire: Wire = Wire()
    guard: Guard = Guard()
    threat: Threat = Threat()
    fleet: FleetSpec = FleetSpec()
    layout: Layout = Layout()
    engine: Engine = Engine()
    knobs: dict[str, Any] = Field(default={}, description="the system's own settings, checked against its Knobs")
    compare: list[
        Literal["local", "centralised", "personal", "synchronous", "diloco", "async_diloco", "acco", "qsdp"]
    ] = Field(default=[], description="arms to run beside the system; the last five beside DiLoCo, on as many tokens")
    personal_steps: Positive = Field(20, description="steps of the personal arm, from the federated state")

    def to_toml(self) -> str:
        """Print the whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hash of the canonical JSON, without what decides only where and how work is divided."""
        content = self.model_dump(mode="json", exclude={"engine": True, "layout": _DIVISION})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def replace(self, changes: dict[str, Any]) -> Recipe:
        """Return a checked copy with dotted keys replaced, e.g. ``{"rounds.count": 3}``."""
        content = self.model_dump()
        for key, value in changes.items():
            *sections, leaf = key.split(".")
            place = content
            for section in sections:
                place = place[section]
            place[leaf] = value
        return Recipe.model_validate(content)
