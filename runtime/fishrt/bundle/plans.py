"""The TensorRT plans that a bundle needs: its graphs, their precision, and the sizes that they are built for.

slow AR        two profiles, for prompts and for single steps; caches of `max_len` rows
frame graph    replaces the fast AR; see `frame`
codec          in float32; the pieces that streams are decoded in, and recordings as long as a prompt may be
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fishrt_engines.engine import GraphSpec
from fishrt_engines.rewrite.tensorrt import LoweringOptions
from fishrt_engines.rewrite.tensorrt_build import PlanRequest
from fishrt_engines.trt.engine import find_built
from fishrt_engines.trt.plans import Profile

from ..codec import chunk_frames
from ..errors import FishrtError, ProviderError
from .features import LanguageModel
from .folder import Bundle
from .manifest import Manifest

PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")
"""Values of PlanOptions.precision."""
USUAL_LEN = 4096
"""Default positions of prompt and speech together: three minutes. A step reads all of them, used or not."""
_SPEECH_ROOM = 2048
"""Positions that a prompt leaves for speech, at most half of all."""
_USUAL_PROMPT = 256
_USUAL_RECORDING_S = 10
_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of a user for the plans of a bundle."""

    precision: str | None = None
    """One of PRECISIONS. None: fp16 for weights in integers, else bf16 if the device has it, else fp16."""
    max_len: int | None = None
    """Positions of prompt and speech together. None: the model's, at most USUAL_LEN."""
    max_batch: int = 1
    """Most sequences at once."""
    workspace: int | None = None
    """Most bytes of device memory for kernels; None: no limit."""
    fp32_attention: bool | None = None
    """Whether attention is computed in float32. None: only if the rest is in float16."""
    primitive_attention: bool = False
    """Whether attention is built from simple operators, for devices without a fused one."""


def plan_requests(bundle: Bundle, options: PlanOptions, capability: tuple[int, int]) -> dict[str, PlanRequest]:
    """Return the plans to build, by role. capability: the device's compute capability.

    Raises ProviderError for a precision that the bundle or fishrt does not have; FishrtError for more positions than the model's.
    """
    manifest = bundle.manifest
    graphs = manifest.specs
    lm, precision = manifest.model, _computed_in(manifest, options.precision, capability)
    limited = with_positions(lm, _positions(lm, options.max_len))
    wide = options.fp32_attention if options.fp32_attention is not None else precision == "fp16"
    language = LoweringOptions(limited.max_seq_len, precision, wide, options.primitive_attention)
    sound = LoweringOptions(None, "fp32", False, options.primitive_attention)
    batch = (1, 1, options.max_batch)
    longest = max(limited.max_prompt, 2)
    columns = {"prefill": (2, min(_USUAL_PROMPT, longest), longest), "step": (1, 1, 1)}
    frame = manifest.graphs["fast_ar"].form("tensorrt", ())
    if frame is None:
        raise ProviderError(
            f"{manifest.name} has no frame graph, which TensorRT runs in place of the fast AR",
            hint=f"first: fishrt retarget {bundle.path} --target tensorrt",
        )

    def request(spec: GraphSpec, lowering: LoweringOptions, *profiles: Profile) -> PlanRequest:
        return PlanRequest(bundle.file(spec.file), spec, lowering, profiles, options.workspace, spec.identity)

    return {
        "slow_ar": request(
            graphs["slow_ar"],
            language,
            *(Profile(name, {"batch": batch, "length": length}) for name, length in columns.items()),
        ),
        "fast_ar": request(frame.spec, language, Profile("frame", {"batch": batch})),
        "codec_decode": request(graphs["codec_decode"], sound, _decoding(manifest)),
        "codec_encode": request(graphs["codec_encode"], sound, _encoding(manifest, longest)),
    }


def within_plans(bundle: Bundle) -> Bundle:
    """Return the bundle with its model limited to the positions of its plan. Raises ProviderError if this machine has no plan."""
    manifest = bundle.manifest
    spec = manifest.specs["slow_ar"]
    plan = find_built(bundle.file(spec.file), spec, identity=spec.identity)
    built = plan.key.lowering.max_len
    assert built is not None  # the slow AR's caches have a length
    model = with_positions(manifest.model, built)
    return replace(bundle, manifest=replace(manifest, model=model))


def with_positions(lm: LanguageModel, positions: int) -> LanguageModel:
    """Return the model with at most so many positions."""
    prompt = positions - min(_SPEECH_ROOM, positions // 2)
    return replace(lm, max_seq_len=min(lm.max_seq_len, positions), max_prompt=min(lm.max_prompt, prompt))


def _positions(lm: LanguageModel, asked: int | None) -> int:
    if asked is None:
        return min(lm.max_seq_len, USUAL_LEN)
    if not 4 <= asked <= lm.max_seq_len:
        raise FishrtError(
            f"the length is {asked}; the model takes up to {lm.max_seq_len} positions", hint=f"--max-len 4 to {lm.max_seq_len}"
        )
    return asked


def _computed_in(manifest: Manifest, asked: str | None, capability: tuple[int, int]) -> str:
    """Return the precision of the language model's plans, fp16 or bf16. Raises ProviderError; see `plan_requests`."""
    stored = manifest.graphs["slow_ar"].precision
    if asked == "fp8":
        raise ProviderError(
            "fp8 needs scales for the activations of every layer, found by running the model on much speech; bundles have none",
            hint="use --precision bf16, or export the bundle with --precision int8 or int4 for smaller weights",
        )
    if asked in ("int8", "int4") and stored != asked:
        raise ProviderError(
            f"{asked} needs weights in {asked}, and those of this bundle's slow AR are in {stored}",
            hint=f"export the checkpoint with --precision {asked}, then build that bundle",
        )
    if asked in ("fp16", "bf16"):
        return asked
    # Scales of integers lose less in float16.
    return "fp16" if stored in ("int8", "int4") or capability < _BF16_CAPABILITY else "bf16"


def _decoding(manifest: Manifest) -> Profile:
    codec, spec = manifest.codec, manifest.specs["codec_decode"]
    _, most = chunk_frames(spec, codec)
    again = 0 if spec.states or codec.context is None else codec.context.left + codec.context.ahead
    return Profile("decode", {"batch": (1, 1, 1), "frames": (1, most, most + again)})


def _encoding(manifest: Manifest, longest: int) -> Profile:
    """Return the codec encoder's profile. longest: columns of the longest prompt, which a voice must fit into."""
    codec = manifest.codec
    least, usual, most = (
        -(-samples // codec.sample_multiple) * codec.sample_multiple
        for samples in (
            codec.min_samples,
            _USUAL_RECORDING_S * codec.sample_rate,
            min(codec.max_frames, longest) * codec.hop,
        )
    )
    return Profile("encode", {"batch": (1, 1, 1), "samples": (least, min(usual, most), most)})
