"""Text from a language model: a prompt, continued token by token."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from pocketzo._core import threads as kernel_threads
from pocketzo.arguments import check_integer
from pocketzo.errors import BundleError, MemoryLimitError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.generation import GENERATE
from pocketzo.machine import cores
from pocketzo.machine.memory import megabytes, resident_memory
from pocketzo.runtime.decoder import Decoder
from pocketzo.runtime.frozen import open_over_base
from pocketzo.runtime.image import Image
from pocketzo.runtime.sampling import Sampler
from pocketzo.runtime.session import open_constant, open_plain, open_with_constants
from pocketzo.runtime.tokenizer import load_tokenizer
from pocketzo.runtime.variables import has_constants, model_with_variables
from pocketzo.runtime.weights import Weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INCOMPLETE: Final = "\ufffd"  # what stands for the bytes of a character that has begun


def open_decoder(bundle: Bundle, image: Image | None, threads: int) -> Decoder:
    """Open ``generate.onnx`` over weights in memory; without an image, over the bundle's file, mapped and prepacked."""
    graph = bundle.generate_path
    if image is None:
        return Decoder(bundle, open_constant(graph, threads))
    if not image.is_whole:
        return Decoder(bundle, open_over_base(bundle, image.values, threads, graph), image)
    if has_constants(bundle):
        with contextlib.suppress(NotPrepackableError):  # slower, and the same
            model = model_with_variables(bundle, graph)
            return Decoder(bundle, open_with_constants(bundle, model, image.values, threads), image)
    return Decoder(bundle, open_plain(bundle, image.values, threads, graph), image)


class Generator:
    """Continues texts by a bundle's ``generate.onnx``.

    Parameters
    ----------
    bundle : Bundle
    weights : Weights, optional
        Weights in memory, as they are when a text is begun. The session reads those of the plain layout where they are,
        and a frozen base from the bundle's file; of prepacked ones it has a copy in the plain layout. By default all of
        the file is mapped and taken for constant, which is faster: onnxruntime prepacks all of it.
    threads : int, optional
        Threads of the session; by default the number of fast cores, but no more than the kernels have.
    max_memory : int, optional
        Limit on the resident memory of this process, in bytes, which the copy must not exceed.

    Attributes
    ----------
    bundle : Bundle
    eos : frozenset of int
        The tokens that end a text.

    Raises
    ------
    BundleError
        The bundle has no ``generate.onnx``, or it is no decoder's.
    MemoryLimitError
        There is no room for the copy; with figures.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights | None = None,
        *,
        threads: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        if bundle.generation is None:
            raise BundleError(
                f"{bundle.path}: there is no {GENERATE} in the bundle, so it generates no text: prepare a decoder's "
                "export with 'pocketzo prepare MODEL.onnx --task causal-lm'"
            )
        self.bundle = bundle
        self.eos = frozenset(bundle.generation.eos)
        self._weights = weights
        self._copy = None
        if weights is not None and not set(weights.locations) <= set(weights.image.views):
            self._copy = _room_for_copy(bundle, max_memory)
        threads = min(cores.fast(), kernel_threads()) if threads is None else threads
        self._refresh()  # what a session folds must be there
        image = weights.image if weights is not None and self._copy is None else self._copy
        self._decoder = open_decoder(bundle, image, threads)
        if not self._decoder.cached:
            warnings.warn(
                f"{bundle.generate_path}: the graph has no cache, so every token takes a pass over the whole text: "
                "export the model with its cache",
                stacklevel=2,
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, which neither pads nor truncates."""
        tokenizer = load_tokenizer(self.bundle)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text.

        Parameters
        ----------
        text : str
        special_tokens : bool
            Whether the tokenizer adds its special tokens. One that ends a text is left out in any case.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=special_tokens)
        ids, added = list(encoding.ids), list(encoding.special_tokens_mask)
        while len(ids) > 1 and added[len(ids) - 1] and ids[-1] in self.eos:
            ids.pop()
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the first one that ends a text."""
        end = next((at for at, token in enumerate(tokens) if token in self.eos), len(tokens))
        text: str = self.tokenizer.decode(list(tokens[:end]))
        return text

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        special_tokens: bool = True,
    ) -> Stream:
        """Continue a prompt; see :meth:`pocketzo.Model.stream`."""
        check_integer("max_tokens", max_tokens, 0)
        sampler = Sampler(temperature, top_p, seed)
        ids = self.encode(prompt, special_tokens=special_tokens) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt has no tokens: give a text of at least one")
        most = self._decoder.vocabulary
        for token in ids:
            check_integer("a token of the prompt", token, 0, most - 1)
        if self._decoder.context is not None and len(ids) >= self._decoder.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and the model reads at most {self._decoder.context}, with those "
                "that it generates: shorten the prompt"
            )
        self._refresh()
        return Stream(self._decoder, self.tokenizer, ids, sampler, self.eos, max_tokens)

    def _refresh(self) -> None:
        """Apply what is pending to the weights, and copy them if there is a copy."""
        if self._weights is None:
            return
        self._weights.flush()
        if self._copy is not None:
            for name, view in self._copy.views.items():
                target, at = view.reshape(-1), 0
                for block in self._weights.blocks(name):
                    target[at : at + block.size] = block
                    at += block.size


def _room_for_copy(bundle: Bundle, most: int | None) -> Image:
    size = bundle.weights_nbytes
    if most is not None and (resident := resident_memory()) + size > most:
        raise MemoryLimitError(
            f"{bundle.path}: generating from prepacked weights takes a copy of {megabytes(size)}, "
            f"{megabytes(resident)} are in use already, and the limit is {megabytes(most)}: load the model with "
            "prepack=False"
        )
    return Image.allocate(bundle)


class Stream(Iterator[str]):
    """The pieces of a text, each as soon as it is known.

    The weights must not change before its end.

    Attributes
    ----------
    prompt : list of int
    tokens : list of int
        What was generated up to now, without the token that ends the text.
    stop : {"eos", "length", "context"} or None
        Why the text ended: by a token that ends it, as there are ``max_tokens``, or as the model reads no more; None
        before its end.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompt: list[int],
        sampler: Sampler,
        eos: frozenset[int],
        max_tokens: int,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.stop: Literal["eos", "length", "context"] | None = None
        self._decoder = decoder
        self._sampler = sampler
        self._eos = eos
        self._max_tokens = max_tokens
        self._pieces = self._decoded(tokenizer)

    def __next__(self) -> str:
        """Return the next piece of the text."""
        return next(self._pieces)

    def _decoded(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the text of the tokens; bytes that do not end a character wait for the next token.

        Each token is decoded with those of the piece before it, or with the prompt: a space may depend on them, and a
        piece begins with a character. Fewer tokens may begin inside one, and some decoders give up all bytes after it.
        """
        window, read = list(self.prompt), len(self.prompt)
        known = text = tokenizer.decode(window)
        for token in self._generated():
            window.append(token)
            text = tokenizer.decode(window)
            if text.endswith(_INCOMPLETE) or len(text) <= len(known):
                continue
            yield text[len(known) :]
            window = window[read:]
            read = len(window)
            known = text = tokenizer.decode(window)
        if len(text) > len(known):
            yield text[len(known) :]

    def _generated(self) -> Iterator[int]:
        reading, unread, context = self._decoder.begin(), self.prompt, self._decoder.context
        while self.stop is None:
            if len(self.tokens) == self._max_tokens:
                self.stop = "length"
            elif context is not None and len(self.prompt) + len(self.tokens) >= context:
                self.stop = "context"
            else:
                token = self._sampler.choose(reading.logits(unread))
                if token in self._eos:
                    self.stop = "eos"
                else:
                    self.tokens.append(token)
                    unread = [token]
                    yield token
