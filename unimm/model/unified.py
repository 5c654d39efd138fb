"""The one model: a sequence of slots goes through one decoder, and two heads read it.

A slot is TEXT, PATCH (a feature of a seen image) or CODE (a code of a drawn image). The hidden
state at slot t predicts slot t + 1, with the head that belongs to the kind of slot t + 1.
`pathway="decoupled"` is Janus's way (an encoder sees, codes have their own embedding and head),
`pathway="shared"` is Emu3's (one vocabulary, one table, one head; seen images are codes too).
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unimm.model.connectors import CONNECTORS
from unimm.model.decoder import Decoder, DecoderConfig, block_mask
from unimm.model.vision import VisionConfig, VisionEncoder

TEXT, PATCH, CODE = 0, 1, 2
KINDS = {"text": TEXT, "code": CODE}  # the kinds that are predicted
LOGITS_AT_ONCE = 2**24  # in training: 64 MiB in float32


@dataclass(frozen=True)
class UnifiedConfig:
    """Shape of a `UnifiedModel`. `decoder.vocab_size` counts text ids alone."""

    decoder: DecoderConfig
    vision: VisionConfig | None  # None: nothing is seen through an encoder
    connector: str  # a name in CONNECTORS
    codebook_size: int
    code_dim: int  # width of the code embedding, before its adapter (decoupled)
    image_head_dim: int  # inner width of the image head (decoupled)
    pathway: str = "decoupled"

    def __post_init__(self) -> None:
        if self.pathway not in ("decoupled", "shared"):
            raise ValueError(f"pathway is 'decoupled' or 'shared', not {self.pathway!r}")
        if self.connector not in CONNECTORS:
            raise ValueError(f"connector is one of {', '.join(CONNECTORS)}, not {self.connector!r}")

    @property
    def table_size(self) -> int:
        """Rows of the decoder's embedding table: text ids, then codes where they are shared."""
        shared = self.pathway == "shared"
        return self.decoder.vocab_size + (self.codebook_size if shared else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "UnifiedConfig":
        vision = VisionConfig(**data["vision"]) if data.get("vision") else None
        return cls(**{**data, "decoder": DecoderConfig(**data["decoder"]), "vision": vision})


@dataclass
class SeenImage:
    """A picture that enters as patches: where its features go in the batch."""

    pixels: Tensor  # (3, h, w), in [-1, 1]
    row: int
    start: int  # the slot of its first patch
    count: int  # how many patch slots it fills


@dataclass
class Batch:
    """Rows of slots. All tensors are (B, T) but `images`.

    ids: a text id, or a code, or 0 at a patch. kind: TEXT, PATCH or CODE. positions: for rope.
    score: float, how much the prediction *of* this slot counts (0: not scored).
    segment: which sample of a packed row a slot belongs to, -1 for padding; None: one sample a row.
    """

    ids: Tensor
    kind: Tensor
    positions: Tensor
    score: Tensor
    images: list[SeenImage] = field(default_factory=list)
    segment: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        moved["images"] = [
            SeenImage(image.pixels.to(device), image.row, image.start, image.count)
            for image in self.images
        ]
        return Batch(**moved)

    def samples(self) -> tuple[Tensor, int]:
        """Which sample each slot is of, (B, T), row after row, and how many samples there are."""
        if self.segment is None:
            rows = torch.arange(len(self.ids), device=self.ids.device)
            return rows[:, None].expand_as(self.ids), len(self.ids)
        counts = self.segment.amax(1) + 1  # (B,)
        first = (counts.cumsum(0) - counts)[:, None]
        return first + self.segment.clamp(min=0), int(counts.sum())

    def weight(self, kind_weights: dict[str, float]) -> float:
        """Sum of the weights of all scored slots: what the loss is divided by."""
        return sum(
            w * float(self.score[self.kind == KINDS[name]].sum())
            for name, w in kind_weights.items()
        )


class Output(NamedTuple):
    """What `forward` returns. `loss` is differentiable; the rest is for the log."""

    loss: Tensor
    auxiliary: dict[str, Tensor]  # further losses that designs may add (already in `loss`)
    nats: dict[str, tuple[float, float]]  # by kind: summed cross-entropy, number of scored slots
    row_nats: dict[str, Tensor]  # by kind: (N,), each sample's cross-entropy, differentiable

    @property
    def log_probs(self) -> Tensor:
        """(N,): of each sample's scored slots together, differentiable."""
        return -torch.stack(list(self.row_nats.values())).sum(0)


class UnifiedModel(nn.Module):
    """Slots in, two heads out.

    Raises ValueError for codes or patches that the configuration has no way to take in.
    """

    def __init__(self, config: UnifiedConfig):
        super().__init__()
        self.config = config
        c = config
        dim = c.decoder.dim
        self.decoder = Decoder(_with_vocab(c.decoder, c.table_size))
        self.text_head = nn.Linear(dim, c.table_size, bias=False)
        nn.init.normal_(self.text_head.weight, std=0.02)
        if c.decoder.tied_embeddings:
            self.text_head.weight = self.decoder.embed_tokens.weight
        self.vision = VisionEncoder(c.vision) if c.vision else None
        self.connector = CONNECTORS[c.connector](c.vision.dim, dim) if c.vision else None
        if c.pathway == "decoupled":
            self.code_embed = nn.Embedding(c.codebook_size, c.code_dim)
            self.code_adapter = CONNECTORS["mlp"](c.code_dim, dim)
            self.image_head = ImageHead(dim, c.image_head_dim, c.codebook_size)

    def forward(
        self,
        batch: Batch,
        kind_weights: dict[str, float] | None = None,
        total: float | None = None,
    ) -> Output:
        """The next-token loss: sum of w * cross-entropy over scored slots, divided by `total`.

        `kind_weights` gives w by kind ("text", "code"), 1 each by default. `total` is the sum of
        the weights over the *global* batch (all ranks and accumulation steps); None: this batch.
        """
        weights = kind_weights or {"text": 1.0, "code": 1.0}
        total = batch.weight(weights) if total is None else total
        mask = None if batch.segment is None else block_mask(batch.segment)
        hidden = self.decoder(self.embed(batch), batch.positions, mask)  # (B, T, D)
        target, kind, score = batch.ids[:, 1:], batch.kind[:, 1:], batch.score[:, 1:]
        loss = hidden.new_zeros((), dtype=torch.float32)
        nats, row_nats = {}, {}
        sample, samples = batch.samples()
        none = hidden.new_zeros(samples, dtype=torch.float32)
        for name, k in KINDS.items():
            at = (kind == k) & (score > 0)
            offset = self.config.decoder.vocab_size if k == CODE and self._shared else 0
            each = self._cross_entropy(hidden[:, :-1][at], target[at] + offset, k) * score[at]
            loss = loss + weights.get(name, 0.0) * each.sum()
            nats[name] = (float(each.detach().sum()), float(score[at].sum()))
            row_nats[name] = none.index_add(0, sample[:, 1:][at], each)
        return Output(loss / max(total, 1e-8), {}, nats, row_nats)

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, D): each slot by the way its kind enters. Only this function knows how."""
        x = self.embed_ids(batch.ids, batch.kind)
        if batch.images:
            x = self._place(x, batch.images)
        elif self.training and self.connector is not None:
            x = x + 0.0 * self._see(self._blank(x)).sum()  # every parameter has a gradient
        return x

    def embed_ids(self, ids: Tensor, kind: Tensor) -> Tensor:
        """(…,) ids and kinds -> (…, D); PATCH slots get the vector of text id 0."""
        is_code = kind == CODE
        if self._shared:
            return self.decoder.embed_tokens(ids + self.config.decoder.vocab_size * is_code)
        text = self.decoder.embed_tokens(ids.masked_fill(is_code, 0))
        codes = self.code_adapter(self.code_embed(ids[is_code])).to(text.dtype)  # (n, D)
        if not len(codes) and self.training:
            dummy = self.code_adapter(self.code_embed(ids.new_zeros(1)))
            return text + 0.0 * dummy.sum()
        return text.masked_scatter(is_code[..., None], codes)

    def logits(self, hidden: Tensor, kind: int, full: bool = False) -> Tensor:
        """(…, D) -> (…, text ids) or (…, codes).

        `full`: in the shared pathway, the whole vocabulary (which training normalises over).
        """
        if kind == CODE and not self._shared:
            return self.image_head(hidden)
        scores = self.text_head(hidden)
        if full or not self._shared:
            return scores
        text_ids = self.config.decoder.vocab_size
        return scores[..., text_ids:] if kind == CODE else scores[..., :text_ids]

    def _cross_entropy(self, hidden: Tensor, target: Tensor, kind: int) -> Tensor:
        """Of (n, D) hidden states and n targets: (n,), float32.

        Never more than `LOGITS_AT_ONCE` logits are held: beyond, they are made a part at a time,
        and once more in the backward.
        """

        def part(hidden: Tensor, target: Tensor) -> Tensor:
            logits = self.logits(hidden, kind, full=True).float()  # (n, K)
            return F.cross_entropy(logits, target, reduction="none")

        classes = (
            self.config.table_size if kind == TEXT or self._shared else self.config.codebook_size
        )
        rows = max(1, LOGITS_AT_ONCE // classes)
        if len(hidden) <= rows:
            return part(hidden, target)
        parts = zip(hidden.split(rows), target.split(rows), strict=True)
        return torch.cat([checkpoint(part, *p, use_reentrant=False) for p in parts])

    def train_code_rows_only(self) -> None:
        """Shared pathway, stage 1: of the one table and the one head only code rows learn.

        A hook sets the gradient of the text rows to zero (use weight decay 0 with it).
        """
        if not self._shared:
            raise ValueError("only the shared pathway has code rows in the text table")
        text_ids = self.config.decoder.vocab_size
        keep = torch.arange(self.config.table_size) >= text_ids
        for weight in {self.decoder.embed_tokens.weight, self.text_head.weight}:
            weight.register_hook(lambda grad: grad * keep[:, None].to(grad))

    @property
    def _shared(self) -> bool:
        return self.config.pathway == "shared"

    def _see(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) -> (N, P, D)."""
        if self.vision is None or self.connector is None:
            raise ValueError("this model has no vision encoder: show it images as codes")
        return self.connector(self.vision(pixels))

    def _place(self, x: Tensor, images: list[SeenImage]) -> Tensor:
        """Put the features of `images` on their slots; pictures of one size go through together."""
        sizes: dict[tuple[int, ...], list[SeenImage]] = {}
        for image in images:
            sizes.setdefault(tuple(image.pixels.shape), []).append(image)
        x = x.clone()
        for group in sizes.values():
            pixels = torch.stack([image.pixels for image in group])  # (N, 3, h, w)
            features = self._see(pixels.to(self.decoder.norm.weight.dtype))  # (N, P, D)
            assert features.shape[1] == group[0].count, "patch slots and features differ in number"
            rows = torch.tensor([image.row for image in group], device=x.device)
            starts = torch.tensor([image.start for image in group], device=x.device)
            slots = starts[:, None] + torch.arange(features.shape[1], device=x.device)  # (N, P)
            x[rows[:, None], slots] = features.to(x.dtype)
        return x

    def _blank(self, x: Tensor) -> Tensor:
        assert self.config.vision is not None
        size = self.config.vision.image_size
        return x.new_zeros((1, 3, size, size))


class ImageHead(nn.Module):
    """Janus's: linear, GELU, linear to the codes."""

    def __init__(self, dim: int, hidden: int, codes: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, codes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(F.gelu(self.proj(hidden)))  # (…, K)


def _with_vocab(config: DecoderConfig, vocab_size: int) -> DecoderConfig:
    return DecoderConfig(**{**asdict(config), "vocab_size": vocab_size})
