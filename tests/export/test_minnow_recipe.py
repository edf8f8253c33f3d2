"""The recipe of the embedded voice: its examples have the runtime's prompts, and its checkpoint can be exported."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fishrt.bundle.folder import Bundle, embedded_bundle
from fishrt.bundle.manifest import Voices
from fishrt.language_model.prompt import PromptBuilder
from fishrt.text.tokenizer import Tokenizer
from fishrt.voices.voice import Voice
from fishrt_export.checkpoint.weights import fuse_weight_norm
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.sources.codec import open_codec
from fishrt_export.sources.language_model import open_language_model
from helpers_text import drawn, language_model
from minnow.recipe.align import Aligner
from minnow.recipe.config import CODEC, LANGUAGE_MODEL
from minnow.recipe.corpus import Sentence
from minnow.recipe.model import DualAr
from minnow.recipe.package import weight_normed
from minnow.recipe.synth import VOICES, Utterance
from minnow.recipe.text_tokens import build_tokenizer, token_id
from minnow.recipe.train_lm import Examples, Sound, Spoken, corrupt

CODEBOOKS = 8
CHECKPOINT = Path(__file__).parents[2] / "export/minnow"
TEXTS = [f"Sentence number {n} is here, isn't it?" for n in range(12)]


def spelled(text: str, seconds: float) -> list[tuple[str, float]]:
    letters = re.findall(r"\w", text)
    return [(letter.upper(), (n + 1) / len(letters) * seconds) for n, letter in enumerate(letters)]


class Data:
    """Utterances without sound, each letter a phone of its own."""

    utterances = tuple(
        Utterance(text, "template", n == 11, VOICES[n % 3], 0, 0, spelled(text, seconds=(40 + n) * 0.04))
        for n, text in enumerate(TEXTS)
    )


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    lengths = [40 + n for n in range(len(TEXTS))]
    codes = np.random.default_rng(0).integers(256, size=(CODEBOOKS, sum(lengths)), dtype=np.uint8)
    np.savez(tmp_path / "codes.npz", codes=codes, starts=np.cumsum([0, *lengths]))
    return Examples(tmp_path, Data())  # type: ignore[arg-type]


@pytest.fixture
def prompts(tmp_path: Path) -> PromptBuilder:
    tokenizer = build_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    begin = token_id(tokenizer, "<|semantic:0|>")
    lm = language_model(
        num_codebooks=CODEBOOKS,
        codebook_width=256,
        semantic_begin_id=begin,
        semantic_end_id=begin + 255,
        end_id=token_id(tokenizer, "<|im_end|>"),
        vocab_size=tokenizer.get_vocab_size(),
    )
    return PromptBuilder(Tokenizer.load(tmp_path / "tokenizer.json"), lm)


def test_examples_are_the_prompts_of_the_runtime(examples: Examples, prompts: PromptBuilder) -> None:
    kinds = set()
    for seed in range(60):
        parts = examples._parts(np.random.default_rng(seed))
        voices, turns = _read(parts)
        conversation = prompts.start(voices)
        for text, codes in turns:
            asked = conversation.user(text)
            conversation.assistant(drawn(codes, prompts.model))
        trained = examples.draw(np.random.default_rng(seed)).prompt
        np.testing.assert_array_equal(trained[:, : asked.shape[1]], asked)
        np.testing.assert_array_equal(trained[1:, asked.shape[1] :][:, : codes.shape[1]], codes)
        kinds.add((len(voices), len(turns), "<|speaker:1|>" in turns[-1][0]))
    assert {voices for voices, _, _ in kinds} == {0, 1, 2, 3}
    assert {turns for _, turns, _ in kinds} == {1, 2}


def _read(parts: list[str | Spoken | Sound]) -> tuple[list[Voice], list[tuple[str, np.ndarray]]]:
    """The voices of an example, and the text and codes of each turn."""
    voices: list[Voice] = []
    turns: list[tuple[str, np.ndarray]] = []
    text = ""
    for n, part in enumerate(parts):
        if isinstance(part, Sound):
            codes = part.of.codes.astype(np.int64)
            if text.rpartition("<|im_start|>")[2].startswith("system"):
                voices.append(Voice(f"v{len(voices)}", codes, part.of.text, None))
            elif isinstance(parts[n - 1], Sound):
                turns[-1] = (turns[-1][0], np.concatenate((turns[-1][1], codes), axis=1))
            else:
                said = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, re.DOTALL)[-1]
                turns.append((said, codes))
        else:
            text += part if isinstance(part, str) else part.text
    return voices, turns


def test_every_frame_knows_its_letter_and_its_phone(examples: Examples) -> None:
    phones = {number: name for name, number in examples.aligner.phones.items()}
    for seed in range(20):
        example = examples.draw(np.random.default_rng(seed))
        before_audio = example.prompt[0, 1:] >= examples.begin
        np.testing.assert_array_equal(example.letter[:-1] > 0, before_audio)
        np.testing.assert_array_equal(example.phones[0, :-1] >= 0, before_audio)
        spoken = np.flatnonzero(example.letter)
        letters = examples.tokenizer.decode([int(i) for i in example.prompt[0, example.letter[spoken]]])
        said = "".join(phones[int(i)] for i in example.phones[0, spoken])
        # Eleven sentences are few to learn the alignment from; a column too far, and hardly any would agree.
        assert np.mean([letter == phone for letter, phone in zip(letters.upper(), said, strict=True)]) > 0.5


def test_letters_are_found_that_say_nothing_or_much() -> None:
    said = {"w": "W", "o": "O", "n": "N", "k": "K", "e": "E", "x": "K S", "2": "T U", "s": "S", "i": "I"}
    texts = ["One knee.", "Six oxen.", "2 knives.", "Kin know.", "Nix 2 keen.", "Sex is six.", "I see 2 oxen.", "Snow."]
    spoken = {text: [p for c in text.lower().replace("kn", "n") for p in said.get(c, "").split()] for text in texts}
    aligner = Aligner(list(spoken.items()), rounds=4)
    assert [text[i] for text in ("Six oxen.",) for i in aligner(text, spoken[text])] == list("Sixxoxxen")
    assert [aligner(text, phones)[1] for text, phones in spoken.items() if text.startswith("2")] == [0]
    with pytest.raises(ValueError, match="too many"):
        aligner("I", ["S"] * 30)


def test_held_out_sentences_are_never_drawn(examples: Examples) -> None:
    spoken = [s.text for sentences in examples.by_voice.values() for s in sentences]
    assert sorted(spoken) == sorted(TEXTS[:11])


def test_a_sentence_is_held_out_by_its_own_words() -> None:
    texts = [f"Line {n}." for n in range(3000)]
    held = [Sentence(t, "template").held_out for t in texts]
    assert 0.01 < np.mean(held) < 0.03
    assert held == [Sentence(t.upper(), "words").held_out for t in texts]


def test_corruption_touches_audio_only_and_keeps_main_and_code_together(examples: Examples) -> None:
    model = DualAr(LANGUAGE_MODEL, vocab_size=576, semantic_begin=examples.begin, end_id=1)
    prompt = torch.from_numpy(examples.draw(np.random.default_rng(1)).prompt)[None]
    changed = corrupt(prompt, model, torch.Generator().manual_seed(1))
    audio = prompt[0, 0] >= examples.begin
    assert torch.equal(changed[0][:, ~audio], prompt[0][:, ~audio])
    assert torch.equal(changed[0, 0, audio] - examples.begin, changed[0, 1, audio])
    assert 0.05 < (changed != prompt)[0, 1:, audio].float().mean() < 0.4


def test_the_packed_codec_is_the_trained_one() -> None:
    codec = Dac(DacConfig.from_json(CODEC), max_frames=1)
    fused = fuse_weight_norm(weight_normed(codec))
    assert fused.keys() == codec.state_dict().keys()
    for name, tensor in codec.state_dict().items():
        torch.testing.assert_close(fused[name].float(), tensor, rtol=2e-3, atol=1e-6)


def test_the_embedded_bundle_is_the_export_of_the_checkpoint_in_the_repository() -> None:
    manifest = Bundle.load(embedded_bundle()).manifest
    assert manifest.codec == open_codec(CHECKPOINT).describe()
    assert manifest.model == open_language_model(CHECKPOINT).describe("audio")
    assert manifest.voices == Voices("awb", ("awb", "rms", "slt"))


def test_both_are_small() -> None:
    assert Bundle.load(embedded_bundle()).manifest.total_bytes <= 16_000_000
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 32_000_000
