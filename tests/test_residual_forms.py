"""Every form in which a branch is added to its stream: found, and exact; and what looks like one and is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from dropbp_fx.graph.naming import module_path
from tests.oracle import DetachPoint, assert_exact
from tests.selection import sweep
from tests.test_branches import search

D, TOKENS, STREAMS = 8, 4, 3
INPUT = torch.linspace(-2, 2, 2 * TOKENS * D).reshape(2, TOKENS, D).sin()
KEPT = torch.tensor([0, 2, 3])


class Work(nn.Module):
    """Two linear layers, from ``inputs`` to ``outputs`` features."""

    def __init__(self, outputs: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Layer(nn.Module):
    """Two pieces of work and whatever a form may weigh them with."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.work, self.other = Work(), Work()
        self.gate = nn.Linear(D, D)
        self.vector = nn.Parameter(torch.linspace(0.3, 0.7, D))
        self.number = nn.Parameter(torch.tensor(0.4))
        self.matrix = nn.Parameter(torch.linspace(-1, 1, D * D).reshape(D, D).cos() / 3)
        self.weight = nn.Identity()  # a place to detach a weight at

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


class Network(nn.Module):
    def __init__(self, form: Callable[[Any, Tensor], Tensor], depth: int = 2) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList(Layer(form) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def square(model: Any) -> Tensor:
    return model(INPUT).square().sum()


def inplace(change: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def form(m: Any, x: Tensor) -> Tensor:
        stream = x * 1.0
        change(m, x, stream)
        return stream

    return form


def written_at(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, KEPT] += m.work(x[:, KEPT])
    return x


def written_slice(m: Any, x: Tensor) -> Tensor:
    stream = x * 1.0
    stream[:, 1:] += m.work(x)[:, 1:]
    return stream


def isub(m: Any, x: Tensor) -> Tensor:
    stream = x * 1.0
    stream -= m.work(x)
    return stream


def highway(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x).sigmoid()
    return gate * m.work(x) + (1 - gate) * x


def foreach(m: Any, x: Tensor) -> Tensor:
    left, right = torch._foreach_add([x, m.vector * x], [m.work(x), m.vector * m.vector])
    return left + right.detach()


def foreach_inplace(m: Any, x: Tensor) -> Tensor:
    left, right = x * 1.0, x * 2.0
    torch._foreach_add_([left, right], [m.work(x), m.vector * x])
    return left + right.detach()


def row(of: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: of(m, x.flatten(0, 1)).view_as(x)


ONE = ["work"]
PRODUCT = ["work", "weight"]
BOTH: list[Any] = ["work", "other"]
#: For each form the modules of a layer that are detached together to drop one branch; several branches in a tuple.
FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str] | tuple[list[str], ...]]] = {
    "sum of a list": (lambda m, x: sum([x, m.work(x), m.other(x)]), (["work"], ["other"])),  # type: ignore[return-value]
    "stack and sum": (lambda m, x: torch.stack([x, m.work(x)]).sum(0), ONE),
    "stack and sum, last": (lambda m, x: torch.sum(torch.stack((x, m.work(x)), dim=-1), dim=-1), ONE),
    "stack and mean": (lambda m, x: torch.stack([m.work(x), x], 1).mean(dim=1), ONE),
    "number first": (lambda m, x: x + 1.0 + m.work(x), ONE),
    "number between": (lambda m, x: x + m.work(x) + 1.0 + m.other(x), (["work"], ["other"])),
    "bias between": (lambda m, x: x + m.work(x) + m.vector + m.other(x), (["work"], ["other"])),
    "number on the branch": (lambda m, x: x + (m.work(x) + 1.0), ONE),
    "bias on the branch": (lambda m, x: x + (m.work(x) + m.weight(m.vector)), PRODUCT),
    "branch in the middle of biases": (lambda m, x: (m.number + x) + (m.work(x) - m.weight(m.vector)), PRODUCT),
    "alpha": (lambda m, x: torch.add(x, m.work(x), alpha=0.5), ONE),
    "alpha on the stream": (lambda m, x: torch.add(m.work(x), x, alpha=0.5), ONE),
    "method with alpha": (lambda m, x: x.add(m.work(x), alpha=-0.5), ONE),
    "minus": (lambda m, x: x - m.work(x), ONE),
    "minus the stream": (lambda m, x: m.work(x) - x, ONE),
    "sub with alpha": (lambda m, x: torch.sub(x, m.work(x), alpha=0.5), ONE),
    "rsub": (lambda m, x: torch.rsub(m.work(x), x, alpha=2), ONE),
    "minus a sum": (lambda m, x: x - (m.work(x) + m.other(x)), (["work"], ["other"])),
    "in place with alpha": (inplace(lambda m, x, y: y.add_(m.work(x), alpha=0.5)), ONE),
    "sub in place": (inplace(lambda m, x, y: y.sub_(m.work(x), alpha=0.5)), ONE),
    "isub": (isub, ONE),
    "addcmul": (lambda m, x: torch.addcmul(x, m.weight(m.vector), m.work(x), value=0.5), PRODUCT),
    "addcmul with a gate": (lambda m, x: torch.addcmul(x, m.other(x).sigmoid(), m.work(x)), BOTH),
    "addcmul in place": (inplace(lambda m, x, y: y.addcmul_(m.weight(m.vector), m.work(x))), PRODUCT),
    "addmm": (row(lambda m, x: torch.addmm(x, m.work(x), m.weight(m.matrix))), PRODUCT),
    "addmm of the stream's norm": (
        row(lambda m, x: torch.addmm(x, m.other(x), m.weight(m.matrix.T), alpha=0.5)),
        ["other", "weight"],
    ),
    "baddbmm": (lambda m, x: x.baddbmm(m.weight(m.work(x) @ x.mT), m.other(x), beta=0.5), ["other", "weight"]),
    "lerp": (lambda m, x: torch.lerp(x, m.work(x), 0.3), ONE),
    "lerp by a parameter": (lambda m, x: x.lerp(m.work(x), m.number), ONE),
    "lerp by a gate": (lambda m, x: x.lerp(m.work(x), m.gate(x).sigmoid()), ONE),
    "lerp from the branch": (lambda m, x: torch.lerp(m.work(x), x, m.vector), ONE),
    "lerp in place": (inplace(lambda m, x, y: y.lerp_(m.work(x), 0.3)), ONE),
    "mix by a number": (lambda m, x: m.number * x + (1 - m.number) * m.work(x), ONE),
    "mix by a vector": (lambda m, x: x * m.vector.sigmoid() + m.work(x) * (1.0 - m.vector.sigmoid()), ONE),
    "highway": (highway, ONE),
    "index_add": (lambda m, x: x.index_add(1, KEPT, m.work(x[:, KEPT])), ONE),
    "index_add twice": (
        lambda m, x: x.index_add(1, KEPT, m.work(x[:, KEPT])).index_add(1, KEPT, m.other(x[:, KEPT]), alpha=0.5),
        (["work"], ["other"]),
    ),
    "index_add in place": (inplace(lambda m, x, y: y.index_add_(1, KEPT, m.work(x[:, KEPT]))), ONE),
    "scatter_add": (
        lambda m, x: x.scatter_add(1, KEPT.view(1, -1, 1).expand(2, -1, D), m.work(x[:, KEPT])),
        ONE,
    ),
    "index_put": (lambda m, x: x.index_put((torch.tensor([0]), KEPT), m.work(x[0, KEPT]), accumulate=True), ONE),
    "added at indices": (written_at, ONE),
    "added to a slice": (written_slice, ONE),
    "list add": (foreach, ONE),
    "list add in place": (foreach_inplace, ONE),
    "broadcast": (lambda m, x: x + m.work(x.mean(1, keepdim=True)), ONE),
    "broadcast beside another": (
        lambda m, x: x + (m.other(x) + m.work(x.amax(1, keepdim=True))),
        (["other"], ["work"]),
    ),
    "where": (lambda m, x: torch.where(x > 0, x + m.work(x), x), ONE),
    "mask": (lambda m, x: x + (x > 0) * m.work(x), ONE),
    "bfloat16 branch": (lambda m, x: x + m.work(x).bfloat16(), ONE),
}


#: Those that the quick tests go through: one of each kind.
QUICK = (
    *("sum of a list", "bias between", "rsub", "sub in place", "addcmul", "addmm", "lerp by a gate"),
    *("index_add", "list add in place", "broadcast beside another", "mix by a vector"),
)


@pytest.mark.parametrize("name", sweep(FORMS, QUICK))
def test_a_form_of_residual_add_is_found_and_exact(name: str) -> None:
    form, detached = FORMS[name]
    model = Network(form)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    groups = detached if isinstance(detached, tuple) else (detached,)
    points: list[DetachPoint] = [
        [f"layers.{i}.{part}" for part in group] for i in range(len(model.layers)) for group in groups
    ]
    everything = range(len(points))
    patterns = [[], [0], [len(points) - 1], list(everything)[1:]]
    loose = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16 branch" else {}
    assert_exact(model, run, backend, square, points, patterns=patterns, **loose)  # type: ignore[arg-type]


class HyperConnection(nn.Module):
    """Several streams: a layer reads a weighted sum of them, they are mixed, and its output is added to each, weighted."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.work = nn.LayerNorm(D), Work()
        self.read = nn.Parameter(torch.linspace(0.2, 0.5, STREAMS))
        self.write = nn.Parameter(torch.linspace(1.2, 0.5, STREAMS))
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.1)
        self.weights = nn.Linear(D, STREAMS + 2)
        self.project = nn.Linear(STREAMS * D, STREAMS * (STREAMS + 2))

    def forward(self, streams: Tensor) -> Tensor:
        return getattr(self, self.how)(streams)

    def static(self, streams: Tensor) -> Tensor:
        mixed = torch.einsum("bsnd,nm->bsmd", streams, self.mix)
        h = self.work(self.norm(torch.einsum("bsnd,n->bsd", streams, self.read)))
        return mixed + h.unsqueeze(-2) * self.write[:, None]

    def unweighted(self, streams: Tensor) -> Tensor:
        return self.mix @ streams + self.work(self.norm((streams * self.read[:, None]).sum(-2))).unsqueeze(-2)

    def repeated(self, streams: Tensor) -> Tensor:
        h = self.work(self.norm(streams.mean(-2)))
        return h.unsqueeze(-2).expand(-1, -1, STREAMS, -1) + torch.matmul(self.mix, streams)

    def dynamic(self, streams: Tensor) -> Tensor:
        """As in the paper: reading and mixing are one product, by weights that are computed from the streams."""
        weights = self.weights(self.norm(streams)).tanh() * 0.1
        alpha = torch.cat([self.read[:, None], self.mix], 1) + weights[..., :-1]
        beta = self.write + weights[..., -1]
        mixed = alpha.transpose(-1, -2) @ streams
        h = self.work(self.norm(mixed[..., 0, :]))
        return torch.einsum("bsd,bsn->bsnd", h, beta) + mixed[..., 1:, :]

    def constrained(self, streams: Tensor) -> Tensor:
        """Manifold-constrained: one projection makes all weights, and the mixing ones become doubly stochastic."""
        weights = self.project(F.rms_norm(streams.flatten(-2), (STREAMS * D,)))
        read, write, mix = weights.split([STREAMS, STREAMS, STREAMS * STREAMS], -1)
        mix = mix.reshape(*mix.shape[:-1], STREAMS, STREAMS).softmax(-1)
        for _ in range(2):
            mix = mix / mix.sum(-2, keepdim=True)
            mix = mix / mix.sum(-1, keepdim=True)
        h = self.work(self.norm((read.sigmoid().unsqueeze(-1) * streams).sum(-2)))
        return (2 * write.sigmoid()).unsqueeze(-1) * h.unsqueeze(-2) + torch.matmul(mix.transpose(-1, -2), streams)

    def folded(self, streams: Tensor) -> Tensor:
        """Streams kept in the batch's dimension."""
        apart = streams.transpose(1, 2).reshape(-1, TOKENS, D).view(-1, STREAMS, TOKENS, D)
        mixed = torch.einsum("st,bsnd->btnd", self.mix, apart)
        h = self.work(self.norm(torch.einsum("s,bsnd->bnd", self.read, apart)))
        return (mixed + torch.einsum("bnd,s->bsnd", h, self.write)).transpose(1, 2)


HYPER = ("unweighted", "repeated", "constrained", "folded")


class HyperNetwork(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList(HyperConnection(how) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        streams = self.stem(x).unsqueeze(-2).repeat(1, 1, STREAMS, 1) * torch.linspace(0.5, 1, STREAMS)[:, None]
        for layer in self.layers:
            streams = layer(streams)
        return self.head(streams.sum(-2))


@pytest.mark.parametrize(
    "how",
    sweep(["static", "dynamic", *HYPER], ["dynamic"]),
)
def test_hyper_connections_are_found_and_the_weights_of_their_streams_keep_their_gradients(how: str) -> None:
    model = HyperNetwork(how)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    points: list[DetachPoint] = [f"layers.{i}.work" for i in range(4)]
    assert_exact(model, run, backend, square, points, patterns=[[], [0], [3], [1, 2], [1, 2, 3]])


class Inner(nn.Module):
    """A mixer that does to a value of its own what ``change`` says, inside of a plain residual branch."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.q, self.o = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.vector = nn.Parameter(torch.linspace(0.3, 0.7, D))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.change(self, self.q(self.norm(x))))


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def rotary(m: Any, x: Tensor) -> Tensor:
    angle = torch.arange(TOKENS)[:, None] * torch.linspace(1, 2, D)
    turned = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    return torch.addcmul(x * angle.cos(), turned, angle.sin()) + x * angle.cos()


def recurrence(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(2, D)
    read = []
    for step in range(TOKENS):
        gate = (m.q(x[:, step]) + m.o(state)).sigmoid()
        state = gate * state + (1 - gate) * (m.q(x[:, step]) + m.o(state)).tanh()
        read.append(state)
    return torch.stack(read, 1)


def experts(m: Any, x: Tensor) -> Tensor:
    weights = m.a(x).softmax(-1)
    return torch.stack([m.q(x) * weights[..., :1], m.o(x) * weights[..., 1:]]).sum(0)


INSIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rotary embedding": rotary,
    "mask": lambda m, x: ((x @ x.mT) - torch.ones(TOKENS, TOKENS).triu(1) * 1e4).softmax(-1) @ x,
    "mask fused": lambda m, x: torch.baddbmm(torch.zeros(TOKENS, TOKENS), x, x.mT).softmax(-1) @ x,
    "bias": lambda m, x: x - m.vector + 1.0,
    "LoRA": lambda m, x: torch.add(m.q(x), m.b(m.a(x)), alpha=2),
    "LoRA fused": lambda m, x: torch.addmm(m.q(x).flatten(0, 1), m.a(x).flatten(0, 1), m.b.weight.T).view_as(x),
    "gated linear unit": lambda m, x: m.q(x).sigmoid() * m.o(x),
    "time mixing": lambda m, x: x * m.vector + shifted(x) * (1 - m.vector),
    "time mixing by lerp": lambda m, x: torch.lerp(x, shifted(x), m.vector),
    "adapter by lerp": lambda m, x: torch.lerp(x, m.b(m.a(x).relu()), 0.5),
    "squeeze and excitation": lambda m, x: x + m.b(m.a(x.mean(1, keepdim=True)).relu()),
    "recurrence": recurrence,
    "experts": experts,
    "position embedding": lambda m, x: torch.add(x, m.vector.expand_as(x), alpha=0.5),
    "local mixing beside attention": lambda m, x: (x @ x.mT).softmax(-1) @ x + m.b(m.a(x)),
    "outer product": lambda m, x: x * 0.5 + (m.vector[:TOKENS, None] * m.vector).expand_as(x),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_looks_like_a_residual_add_inside_of_a_branch_belongs_to_it(name: str) -> None:
    model = nn.Sequential(*(Inner(INSIDE[name]) for _ in range(2)))
    found = search(model, INPUT).branches
    assert [module_path(branch.outputs[0][0]) for branch in found] == ["0.o", "1.o"]
    assert all(len(branch.outputs) == 1 for branch in found)


class Alone(nn.Module):
    """Nothing is added to a stream here."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.vector = nn.Parameter(torch.linspace(0.3, 0.7, D))
        self.register_buffer("average", torch.zeros(D))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def running_average(m: Any, x: Tensor) -> Tensor:
    y = m.o(m.q(x).tanh())
    m.average.lerp_(y.detach().mean((0, 1)), 0.1)
    return y - m.average


def noise_prediction(m: Any, x: Tensor) -> Tensor:
    noise = torch.linspace(-1, 1, x.numel()).view_as(x)
    return (m.o(m.q(0.8 * x + 0.6 * noise).tanh()) - noise).square().mean()


ALONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "autoencoder": lambda m, x: (x - m.o(m.q(x).tanh())).square().mean(),
    "autoencoder, absolute": lambda m, x: torch.sub(m.o(m.q(x).tanh()), x).abs().sum(),
    "noise prediction": noise_prediction,
    "running average": running_average,
    "recurrence": recurrence,
    "projections": lambda m, x: torch.lerp(m.q(x), m.o(x), m.vector),
    "projected shortcut": lambda m, x: torch.sub(m.q(x), m.o(m.o(x).tanh())),
    "mean of one number": lambda m, x: x + m.o(m.q(x).tanh()).mean(),
    "losses": lambda m, x: m.q(x).square().mean() + 0.1 * m.o(m.q(x)).abs().mean(),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_sum_without_a_stream_has_no_branch(name: str) -> None:
    assert search(Alone(ALONE[name]), INPUT).branches == ()
