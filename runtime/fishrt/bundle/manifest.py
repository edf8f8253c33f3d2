"""The content of `manifest.json`: all that the runtime needs to know of a model, so that no code asks which release it is.

It is strict: an unknown key, a missing key and a value out of range are errors that name it.

    kind of model ─► roles ─► for each a portable graph of standard ONNX, and forms of it that a provider runs faster
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

from fishrt_engines import GraphSpec
from fishrt_engines.providers import PROVIDERS

from ..errors import BundleError
from .diffusion import Diffusion
from .features import Codec, LanguageModel
from .quantisation import LEVELS, ROWS, Quantisation, UtteranceError
from .strict import AGAIN, parse_dataclass

AnyModel = LanguageModel | Diffusion
SCHEMA = 4
MANIFEST = "manifest.json"
_CODEC = ("codec_encode", "codec_decode")
ROLES: Mapping[str, tuple[str, ...]] = {
    "dual_ar": ("slow_ar", "fast_ar", *_CODEC),
    "diffusion": ("text_cond", "speaker_cond", "latent_cond", "schedule", "denoise", *_CODEC),
}
"""Roles of the graphs by the kind of model. Only a blockwise diffusion model has latent_cond."""
PRECISIONS = ("fp32", "fp16", "int8", ROWS, "int4")
"""Formats of stored weights. fp32: as in the checkpoint, maybe in 16 bits. The computation is in float32 in any case."""
TARGETS = tuple(PROVIDERS)
"""Providers for which graphs may have forms."""
RETARGET = "fishrt retarget BUNDLE --target cpu"
"""The command that turns a bundle of schema 3 into one of this schema."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest error of a graph against the torch module, measured by the export.

    For numbers, the absolute difference, divided by max(1, largest value ÷ 50). For codes, the margin by which the module
    preferred another code: 0 if all were equal. For whole columns, which a frame graph draws, the share of columns that differ.
    """

    max_abs_error: float
    tolerance: float
    provider: str

    def summary(self, graph: GraphSpec) -> str:
        """Return the error in words. graph: the graph that was measured."""
        if {tensor.dtype for tensor in graph.results} != {"int64"}:
            return f"largest error {self.max_abs_error:.2g} of {self.tolerance:g} allowed"
        if graph.results[0].name == "column":
            return f"{self.max_abs_error:.1%} of columns differ, {self.tolerance:.1%} are allowed"
        if not self.max_abs_error:
            return "0 codes differ"
        return f"codes differ where the choice was unclear, by a margin of {self.max_abs_error:.2g} of {self.tolerance:g} allowed"


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms of the weights. `file` is the notice inside the bundle, if the checkpoint had one."""

    name: str
    file: str | None


@dataclass(frozen=True, slots=True)
class Voices:
    """Voices shipped with the bundle, in `voices/<name>/`; `default` speaks if a request names none."""

    default: str
    names: tuple[str, ...]

    @property
    def ordered(self) -> tuple[str, ...]:
        """All names, the default first: voice i speaks `<|speaker:i|>` if a request names no voice."""
        return (self.default, *(name for name in self.names if name != self.default))


@dataclass(frozen=True, slots=True)
class Usability:
    """The usability checker's result for one graph as a CoreML ML program."""

    partitions: int
    """Number of parts that CoreML would run; the CPU runs the nodes between them."""
    covered: int
    """Number of nodes in these parts."""
    nodes: int
    """Number of all nodes, except those that only convert weights."""
    verdict: str
    """Whether CoreML is worth trying, by the checker: NO, MAYBE or YES."""
    outside: tuple[str, ...]
    """Operators that CoreML does not have."""


@dataclass(frozen=True, slots=True)
class FixedPart:
    """A graph for calls of one length and a batch of one, in two parts."""

    frames: int
    front: GraphSpec
    """The part with integer inputs, which runs on the CPU. It has no state."""
    back: GraphSpec
    """The rest, which runs on the provider: its inputs are the results of `front` and floats, and it has the whole state."""
    usability: Usability
    """Usability of `back`."""
    parity: Parity
    """Error against the portable graph."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding error of a codec in integers of 8 bits, measured by the export with exact products, as with VNNI."""

    convolutions: int
    """Number of convolutions in integers."""
    calibration_frames: int
    """Number of random frames on which the ranges of activations were measured."""
    snr_db: float
    """Mean power of the portable graph's sound over that of the error, in dB, on streams of other random codes."""
    least_snr_db: float
    """The least of these ratios, in dB."""

    def summary(self) -> str:
        """Return a line of text."""
        ratio = f"{self.snr_db:.1f} dB, {self.least_snr_db:.1f} dB at least"
        return f"{self.convolutions} convolutions of the decoder in 8 bits, signal over error {ratio} (random codes)"


@dataclass(frozen=True, slots=True)
class Form:
    """A graph as one provider runs it best. Its weights are those of the portable graph, and those in a file of its own."""

    provider: str
    spec: GraphSpec
    needs: tuple[str, ...] = ()
    """Features that the machine must have, all of them: see `fishrt_engines.machine.features`."""
    parity: Parity | None = None
    """Error against the torch module, with the options that speaking uses. None: it was not measured, or not in this way."""
    activations_error: float | None = None
    """Error that rounded activations add, with `spec.rounds_activations`: its root mean square ÷ that of the results."""
    rounding: Rounding | None = None
    convolutions: dict[str, int] = field(default_factory=dict)
    """Convolutions of a codec on rows, by how they are computed: see `fishrt_export.targets.codec.decoder`."""
    parts: tuple[FixedPart, ...] = ()
    """Graphs of fixed sizes that run the calls instead of a graph of `spec`, which describes the calls."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its graphs."""
        return tuple(spec.file for part in self.parts for spec in (part.front, part.back)) or (self.spec.file,)


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one role."""

    spec: GraphSpec
    """The portable graph."""
    precision: str
    """Format of most of its weights, one of PRECISIONS or of quantisation.LEVELS."""
    memory: int
    """Bytes of its weights after ONNX Runtime has loaded it for a CPU."""
    parity: Parity | None = None
    """Error of the portable graph."""
    forms: tuple[Form, ...] = ()
    coreml_step: Usability | None = None
    """The checker's result for a call of one column of a language model, whose graph is not kept: the CPU runs it."""
    utterance: UtteranceError | None = None
    """Of a denoiser: the error of rounded weights over an utterance. None: none is rounded, or it was not measured."""

    def form(self, provider: str, features: Collection[str]) -> Form | None:
        """Return the first form for a provider whose needs are among `features`; None: the portable graph is to be run."""
        return next((form for form in self.forms if form.provider == provider and set(form.needs) <= set(features)), None)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all graph files: the portable graph's, then those of its forms."""
        return (self.spec.file, *(file for form in self.forms for file in form.files))

    def sealed(self, files: Mapping[str, FileEntry]) -> Graph:
        """Return the graph with identities: hashes in hex of each graph file and of the weights that it reads."""

        def seal(spec: GraphSpec) -> GraphSpec:
            names = dict.fromkeys((spec.file, f"{spec.file}.data", f"{self.spec.file}.data"))
            hashes = " ".join(files[name].sha256 for name in names if name in files)
            return replace(spec, identity=hashlib.sha256(hashes.encode()).hexdigest() if hashes else "")

        def part(of: FixedPart) -> FixedPart:
            return replace(of, front=seal(of.front), back=seal(of.back))

        forms = (replace(form, spec=seal(form.spec), parts=tuple(map(part, form.parts))) for form in self.forms)
        return replace(self, spec=seal(self.spec), forms=tuple(forms))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    schema: int
    name: str
    """For people only."""
    exported_by: str
    family: str
    """Releases whose layout the checkpoint has, for people only."""
    recipe: str
    """Options of `fishrt export`, for people only: the precision, then those that differ from the defaults."""
    model: AnyModel
    codec: Codec
    tokenizer: str | None
    """File name of the tokenizer. None: the tokens are bytes."""
    graphs: dict[str, Graph]
    """Graphs by role: all `roles`."""
    quantisation: Quantisation | None
    """Rounding errors of the model's layers. None: none is quantised."""
    licence: Licence
    voices: Voices | None
    files: dict[str, FileEntry]

    def __repr__(self) -> str:
        return f"<Manifest of {self.summary}>"

    @property
    def summary(self) -> str:
        """The name of the bundle, with its family and recipe."""
        return f"{self.name} ({', '.join(filter(None, (self.family, self.recipe)))})"

    @property
    def language_model(self) -> LanguageModel:
        """The model, for code that runs language models only. Raises BundleError for a model of another kind."""
        if isinstance(self.model, LanguageModel):
            return self.model
        raise BundleError(f"this is for language models; {self.name} is a {self.model.kind} model")

    @property
    def diffusion(self) -> Diffusion:
        """The model, for code that runs diffusion models only. Raises BundleError for a model of another kind."""
        if isinstance(self.model, Diffusion):
            return self.model
        raise BundleError(f"this is for diffusion models; {self.name} is a language model")

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the graphs that the bundle must have."""
        whole = isinstance(self.model, Diffusion) and not self.model.blockwise
        return tuple(role for role in ROLES[self.model.kind] if not (whole and role == "latent_cond"))

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def specs(self) -> dict[str, GraphSpec]:
        """The specs of the portable graphs by role."""
        return {role: graph.spec for role, graph in self.graphs.items()}

    def sealed(self, files: Mapping[str, FileEntry]) -> Manifest:
        """Return the manifest of a folder with these files, and with the identities of its graphs."""
        return replace(self, files=dict(files), graphs={role: graph.sealed(files) for role, graph in self.graphs.items()})

    def check(self) -> None:
        """Check all values. Raises one BundleError that lists those that are out of range or contradict each other."""
        model, codec, roles = self.model, self.codec, self.roles
        faults = [*model.faults(), *codec.faults()]
        if isinstance(model, LanguageModel):
            fits = model.num_codebooks <= len(codec.codebook_sizes)
            unfit = f"num_codebooks is {model.num_codebooks}, but there are {len(codec.codebook_sizes)} codebook_sizes"
        else:
            fits = codec.channels == model.channels
            unfit = f"channels is {model.channels}, but those of the codec are {codec.channels}"
        rules = (
            (fits, unfit),
            (
                self.graphs.keys() == set(roles),
                f"the graphs are {', '.join(self.graphs) or 'none'}; they must be {', '.join(roles)}",
            ),
            (
                isinstance(model, LanguageModel) == (self.tokenizer is not None),
                f"the tokenizer is {self.tokenizer} for a model of the kind {model.kind}",
            ),
            (
                self.voices is None or self.voices.default in self.voices.names,
                f"the default voice {self.voices and self.voices.default!r} is not among the voices",
            ),
            *(
                (
                    graph.precision in (*PRECISIONS, *LEVELS),
                    f"the precision of {role} is {graph.precision!r}; it must be one of {', '.join((*PRECISIONS, *LEVELS))}",
                )
                for role, graph in self.graphs.items()
            ),
            *((graph.memory >= 0, f"the memory of {role} is {graph.memory} bytes") for role, graph in self.graphs.items()),
        )
        faults += [says for holds, says in rules if not holds] or self._misfits()
        if faults:
            raise BundleError(f"{MANIFEST} cannot be right: {'; '.join(faults)}", hint="update fishrt, or export again")

    def _misfits(self) -> list[str]:
        """Return a message for each tensor of which a dimension contradicts the manifest. All roles must be there."""
        faults = []
        for role, name, axis, width in self._widths():
            spec = self.graphs[role].spec
            shapes = [tensor.shape for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name]
            if not shapes or len(shapes[0]) < 2 or shapes[0][axis] != width:
                found = list(shapes[0]) if shapes else "missing"
                which = "second" if axis == 1 else "last"
                faults.append(f"{name} of {role} is {found}, expected a {which} dimension of {width}")
        for graph in self.graphs.values():
            faults += [
                f"{', '.join(sorted(wrong))} of {form.spec.file} are not as in {graph.spec.file}"
                for form in graph.forms
                if (wrong := self._unlike(form.spec, graph.spec))
            ]
        return faults

    def _unlike(self, form: GraphSpec, portable: GraphSpec) -> set[str]:
        """Return the names of tensors by which a form cannot take the calls of the portable graph. State may have another type.

        A frame graph takes the slow AR's results, and gives a column.
        """
        if isinstance(self.model, LanguageModel) and [tensor.name for tensor in form.outputs] == ["column"]:
            given = {tensor for tensor in self.graphs["slow_ar"].spec.results if tensor.name in ("logits", "hidden")}
            wide = form.outputs[0].shape[-1] == 1 + self.model.num_codebooks
            return {tensor.name for tensor in given.difference(form.feeds)} | (set() if wide else {"column"})
        return {each[1] for each in _interface(form) ^ _interface(portable)}

    def _widths(self) -> list[tuple[str, str, int, int]]:
        """Return role, name, axis and size of the tensors that tell whether the graphs are of this model and codec."""
        model, books = self.model, len(self.codec.codebook_sizes)
        if isinstance(model, LanguageModel):
            rows = model.vocab_size if model.head == "full" else model.semantic_end_id - model.semantic_begin_id + 2
            return [
                ("slow_ar", "prompt", 1, 1 + model.num_codebooks),
                ("slow_ar", "logits", 1, rows),
                ("fast_ar", "logits", 1, model.codebook_width),
                ("codec_encode", "codes", 1, books),
                ("codec_decode", "codes", 1, books),
            ]
        return [
            ("text_cond", "text_keys", -1, model.head_dim),
            ("speaker_cond", "speaker_keys", -1, model.head_dim),
            ("schedule", "modulation", 1, model.layers),
            ("schedule", "modulation", -1, model.width),
            ("denoise", "velocity", -1, model.channels),
            ("codec_encode", "latents", -1, model.channels),
            ("codec_decode", "latents", -1, model.channels),
        ]

    def to_json(self) -> str:
        """Return the text of `manifest.json`: a tensor, a file and a list of numbers have a line each."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        for innermost in (r"\[\n[^\[\]{}]*\]", r"\{\n[^{}]*\}"):
            text = re.sub(innermost, lambda found: re.sub(r"\n\s*", " ", found[0]), text)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of a `manifest.json`.

        Raises BundleError for text that is not JSON, another schema, a missing, unknown or mistyped key, and as `check`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}", hint=AGAIN) from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int):
            raise BundleError(f"{MANIFEST} has no schema number", hint="is this a fishrt bundle?")
        if schema != SCHEMA:
            hints = {SCHEMA - 1: f"bring it up to date with `{RETARGET}`, or export the checkpoint again"}
            raise BundleError(
                f"{MANIFEST} has schema {schema}; this version reads schema {SCHEMA}",
                hint="update fishrt" if schema > SCHEMA else hints.get(schema, "export the checkpoint again with this version"),
            )
        manifest = parse_dataclass(cls, data, "manifest")
        manifest.check()
        return manifest


def _interface(spec: GraphSpec) -> set[tuple[str, str, object]]:
    """Return all that a caller of a graph sees of it; the second of each is the name of a tensor."""
    kinds = (("feed", spec.feeds), ("result", spec.results))
    found: set[tuple[str, str, object]] = {(kind, tensor.name, tensor) for kind, tensors in kinds for tensor in tensors}
    return found | {("state", tensor.name, tensor.shape) for tensor in spec.state_tensors}
