"""What a model is run on for the ``forward`` verification: prompts, or random words, pictures or sounds of the sizes
that its config says. Made from the config alone, so that a model without any is refused before it is merged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from loreg.errors import LoregError, NotFound, Unsupported

PROMPTS = (
    "The capital of France is",
    "Write a SQL query that counts the users of each country.",
    "Tell me a joke about a cat.",
    "def fibonacci(n):",
)
_COUNT = 4
_LENGTH = 32
_DECODED = 8
_SAMPLES = 16_000  # a second of sound
_FRAMES = 128
_PIXELS = 224  # where no config says it, as of a ResNet
_LARGEST = 1 << 24  # elements, beyond any picture: an edited config would else take all memory
_NAMES = ("input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features")
_INSIDE = ("vision_config", "encoder", "audio_config", "audio_encoder", "encoder_config", "backbone_config")

Sample = Mapping[str, torch.Tensor]
"""The named inputs of one run."""


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model that transformers makes from its directory, as ``kind`` with ``config``, and what it is run on."""

    root: Path
    config: Any
    kind: Any
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, root: Path) -> Runnable:
        """Reads the config and the tokenizer, no weights. Raises NotFound without transformers, Unsupported for a
        model that it does not know, or that no input can be made for."""
        transformers = library()
        with failing(f"{root}: transformers cannot read the config"), quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(root)
        kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            raise Unsupported(
                f"{root}: config.json names no architecture that transformers knows, so it cannot be run: verify "
                "with probe or exact."
            )
        return cls(root, config, kind, tuple(_Maker(root, config, kind).samples()))

    def load(self, root: Path, dtype: torch.dtype | None) -> Any:
        """The model in ``root``, which is this one or merged from it, in ``dtype`` or that of its config."""
        with failing(f"{root}: {self.kind.__name__} of transformers cannot be loaded"), quiet(library()):
            return self.kind.from_pretrained(root, dtype=dtype or "auto").eval()

    @torch.no_grad()
    def outputs(self, model: Any) -> list[torch.Tensor]:
        """Logits (or last hidden states) in float64, one tensor (1, …, classes) per sample.

        What a model draws at random, as a ViTMAE does its mask, is the same in every run.
        """
        return [self._output(model, sample) for sample in self.samples]

    def _output(self, model: Any, sample: Sample) -> torch.Tensor:
        given = {
            name: value.to(model.dtype) if value.is_floating_point() else value for name, value in sample.items()
        }
        shapes = " and ".join(f"{name} of {list(value.shape)}" for name, value in sample.items())
        with failing(f"{self.kind.__name__} cannot be run on {shapes}"), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            output = model(**given)
            found: torch.Tensor = (output.logits if "logits" in output else output[0]).double()
            # A picture's classes or channels come before its height and width.
            return found.movedim(1, -1) if found.ndim == 4 else found


def library() -> Any:
    """transformers. Raises NotFound."""
    try:
        import transformers
    except ImportError as error:
        raise NotFound("--verify forward needs transformers: pip install 'loreg[peft]'.") from error
    return transformers


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Of a stranger's model any error may come out of transformers: each becomes Unsupported, saying ``what``."""
    try:
        yield
    except LoregError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Unsupported(f"{what} ({reason}), so nothing can be compared: verify with probe or exact.") from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No bars and no chatter of transformers on a terminal that shows ours; as it was afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class _Maker:
    """Samples by a model's config, always the same ones."""

    def __init__(self, root: Path, config: Any, kind: Any) -> None:
        self._root, self._config, self._kind = root, config, kind
        inner = [getattr(config, name, None) for name in _INSIDE]
        self._configs = [config, *(each for each in inner if each is not None)]
        self._generator = torch.Generator().manual_seed(0)

    def samples(self) -> Iterator[Sample]:
        """Raises Unsupported for a model whose inputs are of another kind, or of sizes that make no sense."""
        accepted = inspect.signature(self._kind.forward).parameters
        main = getattr(self._kind, "main_input_name", None)
        names = [name for name in ("input_ids", main, *_NAMES) if name in _NAMES and name in accepted][:1]
        if not names:
            raise Unsupported(
                f"{self._root}: {self._kind.__name__} is run on {str(main)[:60]!r}, of which loreg makes no sample: "
                "verify with probe or exact."
            )
        if names == ["input_ids"] and "pixel_values" in accepted and self._has_two_towers():
            names.append("pixel_values")
        decodes = getattr(self._config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted
        prompts = self._prompts() if "input_ids" in names else []
        for index in range(len(prompts) or _COUNT):
            sample = {name: prompts[index] if name == "input_ids" else self._random(name) for name in names}
            if decodes:
                sample["decoder_input_ids"] = sample["input_ids"] if prompts else self._ids(_DECODED)
            yield sample

    def _has_two_towers(self) -> bool:
        """Whether pictures go beside the text, as of CLIP, and not into it in the place of a word."""
        words = ("image_token_id", "image_token_index")
        both = all(hasattr(self._config, name) for name in ("vision_config", "text_config"))
        return both and not any(hasattr(self._config, word) for word in words)

    def _prompts(self) -> list[torch.Tensor]:
        """Token ids (1, n): of prompts if the model has a tokenizer, else random ones."""
        if not any((self._root / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return [self._ids(_LENGTH) for _ in range(_COUNT)]
        with failing(f"{self._root}: transformers cannot read the tokenizer"), quiet(library()):
            tokenizer = library().AutoTokenizer.from_pretrained(self._root)
            return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]

    def _ids(self, length: int) -> torch.Tensor:
        words = getattr(self._config, "decoder", None) or self._config.get_text_config()
        count = self._whole("vocab_size", getattr(words, "vocab_size", None))
        return torch.randint(0, count, (1, length), generator=self._generator)

    def _random(self, name: str) -> torch.Tensor:
        """Multiples of 1/16 from -2 to 2, which every dtype holds: a rounding would count as noise."""
        if name == "input_values":
            shape = self._waveform()
        elif name == "input_features":
            shape = self._features()
        else:
            shape = self._picture(name)
        if prod(shape) > _LARGEST:
            raise self._strange(name, list(shape))
        return torch.randint(-32, 33, shape, generator=self._generator) / 16

    def _picture(self, name: str) -> tuple[int, ...]:
        size = self._field("image_size", "crop_size", default=_PIXELS)
        if isinstance(size, Mapping):
            size = [size.get("height"), size.get("width")]
        sides = size if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2:
            raise self._strange("image_size", size)
        height, width = (self._whole("image_size", side) for side in sides)
        channels = self._whole("num_channels", self._field("num_channels", "in_chans", "in_channels", default=3))
        frames = self._field("num_frames", "frames_per_clip")
        if frames is None and name == "pixel_values":
            return 1, channels, height, width
        return 1, self._whole("num_frames", frames), channels, height, width

    def _waveform(self) -> tuple[int, ...]:
        bins, length = self._field("num_mel_bins"), self._field("max_length")
        if bins is not None and self._config.model_type == "audio-spectrogram-transformer":
            return 1, self._whole("max_length", length), self._whole("num_mel_bins", bins)
        channels = self._field("audio_channels")
        return (1, _SAMPLES) if channels is None else (1, self._whole("audio_channels", channels), _SAMPLES)

    def _features(self) -> tuple[int, ...]:
        bins, places = self._field("num_mel_bins"), self._field("max_source_positions")
        width = self._field("feature_projection_input_dim", "input_feat_per_channel")
        if width is not None:
            return 1, _FRAMES, self._whole("feature_projection_input_dim", width)
        if bins is None:
            raise self._strange("num_mel_bins", bins)
        if places is None:
            return 1, _FRAMES, self._whole("num_mel_bins", bins)
        # Whisper halves the frames before it counts their places.
        return 1, self._whole("num_mel_bins", bins), 2 * self._whole("max_source_positions", places)

    def _field(self, *names: str, default: Any = None) -> Any:
        found = (getattr(config, name, None) for config in self._configs for name in names)
        return next((value for value in found if value is not None), default)

    def _whole(self, name: str, value: object) -> int:
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise self._strange(name, value)
        return value

    def _strange(self, name: str, value: object) -> Unsupported:
        return Unsupported(
            f"{self._root}: {self._kind.__name__} has {name} {str(value)[:60]}, so that no sample can be made "
            "to run it on: verify with probe or exact."
        )
