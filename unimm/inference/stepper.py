"""One step of the decoder for the slots of many requests: the C++ kernel, or torch.

A step is M slots, each with its row of the cache and its place there; rows may have any lengths,
and a row may have a window of several slots. Few slots go through the kernel in one call; with
many, torch does the products and the kernel the attention; without a kernel torch does it all, and
faster where the weights are packed for it (`prepare`).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.inference import packed
from unimm.inference.kernel import Drawing, Kernel, free_threads, make_kernel, signature
from unimm.inference.products import ManyRows
from unimm.inference.sampling import Ahead, choose, guide
from unimm.model.decoder import KVCache
from unimm.model.int8 import is_quantized
from unimm.model.unified import CODE, TEXT, UnifiedModel

AMX, DOTS = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
# Slots: up to so many the kernel's products win.
FEW = {torch.float32: 64, torch.bfloat16: 24 if AMX else 128 if DOTS else 64}
# Slots of a step that tries several codes of each picture: up to so many they pay for themselves.
KERNEL_SLOTS, INT8_SLOTS, TORCH_SLOTS = 8, 4, 24


class Stepper:
    """A model made ready for steps. Weights may change between calls of `refresh`, not within."""

    def __init__(self, model: UnifiedModel):
        self.model = model
        self.kernel: Kernel | None = None
        self._packed: packed.Steps | None = None
        self._table: Tensor | None = None
        self._signature: tuple | None = None
        self._drawings: dict[tuple[float, float], Drawing] = {}
        self._noise = Ahead()
        self._slots = TORCH_SLOTS  # of a step that tries several codes of each picture

    @property
    def device(self) -> torch.device:
        return self.model.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.decoder.norm.weight.dtype

    @property
    def signature(self) -> tuple | None:
        """Of the weights that are ready: it differs where they do."""
        return self._signature

    def refresh(self) -> bool:
        """Make the weights ready if they are not those that were; whether they have changed."""
        found = signature(self.model)
        changed = found != self._signature
        if changed:
            self._table, self._drawings = None, {}
            self.kernel = make_kernel(self.model)
            packs = self.kernel is None and packed.is_packed(self.model.decoder)
            self._packed = packed.Steps(self.model.decoder) if packs else None
            self._signature, self._slots = found, TORCH_SLOTS
            if self.kernel is not None:
                self._slots = INT8_SLOTS if is_quantized(self.model) else KERNEL_SLOTS
        if self.kernel is not None:
            self.kernel.threads = free_threads()
        return changed

    def embed(self, ids: Tensor, kinds: list[int]) -> Tensor:
        """Ids (M,) of TEXT and CODE slots -> (M, D)."""
        if all(kind == TEXT for kind in kinds):
            return self.model.decoder.embed_tokens(ids)
        if all(kind == CODE for kind in kinds):
            return self.code_embedding()(ids)
        kind = torch.tensor(kinds, device=ids.device)
        return self.model.embed_ids(ids, kind)

    def code_embedding(self) -> Callable[[Tensor], Tensor]:
        """The function codes (M,) -> (M, D) of the weights that are ready."""
        if self.model.config.pathway == "shared":
            words, embed = self.model.config.decoder.vocab_size, self.model.decoder.embed_tokens
            return lambda codes: embed(codes + words)
        return partial(F.embedding, weight=self.table())

    def table(self) -> Tensor:
        """The vector of every code as it enters the decoder, (codes, D): embedding and adapter."""
        if self._table is None:
            m = self.model
            self._table = m.code_adapter(m.code_embed.weight).to(self.dtype)
        return self._table

    def forward(self, x: Tensor, cache: KVCache, window: int = 1) -> Tensor:
        """x (R * window, D), row after row of the cache's R rows, each behind its row's length.

        Returns normed hidden states (R * window, D). The caller then advances the cache.
        """
        slots = cache.slots(window)  # (R, window)
        rows, autocast = x.view(len(slots), window, -1), torch.is_autocast_enabled(x.device.type)
        if self._packed is not None:
            return self._packed(rows, slots, cache).flatten(0, 1)
        if self.kernel is None or autocast:
            return self.model.decoder(rows, slots, cache=cache).flatten(0, 1)
        if cache.longest + window > cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} slots a row")
        row = rows_of(len(slots), window)
        slot = slots.reshape(-1).contiguous()
        if self.few(len(x)):
            return self.kernel.step(x, row, slot, cache)
        with ManyRows():
            return self._many(x.to(self.dtype), row, slot, cache, self.kernel)

    def fill(self, x: Tensor, cache: KVCache, last: bool = False) -> Tensor:
        """`forward` for prompts x (R, T, D), which may be long -> (R, T, D); last: (R, 1, D)."""
        rows, new, _ = x.shape
        if not self.few(rows * new):
            return self.model.decoder(x, cache.slots(new), cache=cache, last=last)
        hidden = self.forward(x.flatten(0, 1), cache, new).view(x.shape).to(x.dtype)
        return hidden[:, -1:] if last else hidden

    def logits(self, hidden: Tensor, kind: int) -> Tensor:
        """(M, D) -> float32 logits (M, text ids) or (M, codes)."""
        model, shared = self.model, self.model.config.pathway == "shared"
        if self.kernel is None or not self.few(len(hidden)):
            return model.logits(hidden.to(self.dtype), kind).float()
        if kind == CODE and not shared:
            return self.kernel.head(model.image_head.proj, model.image_head.out, hidden)
        scores, words = self.kernel.linear(model.text_head, hidden), model.config.decoder.vocab_size
        if not shared:
            return scores
        return scores[:, words:].contiguous() if kind == CODE else scores[:, :words]

    def draw(
        self, cache: KVCache, tries: list[list[int]], rows: list[list[int]], seeds: list[int],
        places: list[int], left: list[int], guidance: float, temperature: float, passes: int,
    ) -> tuple[list[list[int]], list[list[int]]] | None:  # fmt: skip
        """The next codes of N pictures under way, and guesses of those that follow: one call of
        the kernel, see `Kernel.draw`. None, with nothing done, where it cannot."""
        kernel, model, autocast = self.kernel, self.model, torch.is_autocast_enabled("cpu")
        slots = cache.rows * len(tries[0])
        if kernel is None or autocast or not self.few(slots) or model.config.pathway == "shared":
            return None
        how = self._drawings.get((guidance, temperature))
        if how is None:
            head, sampling = model.image_head, (guidance, temperature)
            how = kernel.drawing(self.table(), head.proj, head.out, *sampling)
            self._drawings[sampling] = how
        codes, guesses, longer = kernel.draw(how, cache, tries, rows, seeds, places, left, passes)
        cache.advance(longer)
        return codes, guesses

    def choose(
        self, logits: Tensor, other: Tensor | None, guidance: float, seeds: list[int],
        places: list[int], temperature: float, top_k: int = 0, top_p: float = 1.0,
    ) -> list[int]:  # fmt: skip
        """Guided logits (M, K) -> ids, as `sampling.choose` has them; other: the unguided ones."""
        if self.kernel is not None and not top_k and top_p == 1:
            rest = [None] * len(logits) if other is None else other
            rows = zip(logits, rest, seeds, places, strict=True)
            return [self.kernel.choose(a, b, guidance, temperature, s, p) for a, b, s, p in rows]
        if other is not None:
            logits = guide(logits, other, guidance)
        device = logits.device
        where = (torch.tensor(seeds, device=device), torch.tensor(places, device=device))
        return choose(logits, *where, temperature, top_k, top_p, noise=self._noise).tolist()

    def window(self, rows: int) -> int:
        """Codes of each picture that a step of so many rows is to try, chosen by measurement.

        As long as the reading of weights, or torch's way to a product, is what takes the time,
        more slots cost little. On a GPU 1: not measured, and there pictures alone go through steps
        of fixed shape (graphs.py).
        """
        if self.device.type != "cpu":
            return 1
        return max(1, self._slots // rows)

    def few(self, slots: int) -> bool:
        """Whether the kernel's own products are the faster way for so many slots."""
        return slots <= FEW.get(self.dtype, 0)

    def _many(self, x: Tensor, row: Tensor, slot: Tensor, cache: KVCache, kernel: Kernel) -> Tensor:
        """`Block.compute` with the kernel's attention."""
        c, count = self.model.decoder.config, len(x)
        block: Any
        for index, block in enumerate(self.model.decoder.layers):
            attention, mlp = block.self_attn, block.mlp
            seen = packed.norm(x, block.input_layernorm.weight, c.norm_eps)
            q = attention.q_proj(seen).view(count, c.heads, c.head_dim)
            k = attention.k_proj(seen).view(count, c.kv_heads, c.head_dim)
            v = attention.v_proj(seen).view(count, c.kv_heads, c.head_dim)
            x = x + attention.o_proj(kernel.attend(index, q, k, v, row, slot, cache))
            seen = packed.norm(x, block.post_attention_layernorm.weight, c.norm_eps)
            x = x + mlp(seen)
        return packed.norm(x, self.model.decoder.norm.weight, c.norm_eps)


@lru_cache(64)
def rows_of(rows: int, window: int) -> Tensor:
    """The row of the cache of each slot of a step, (M,)."""
    return torch.arange(rows).repeat_interleave(window)


def prepare(model: UnifiedModel) -> None:
    """Pack the weights of a model that is not to learn, where there is no kernel for it."""
    if model.decoder.norm.weight.device.type == "cpu" and make_kernel(model) is None:
        packed.pack(model)
