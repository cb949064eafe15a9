"""The loss without logits: the numbers of the loss with them, from some rows at a time; and when it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from areal_ray.config import ConfigError, load
from areal_ray.engine import hidden
from areal_ray.engine.chunked.row_losses import normalised
from areal_ray.engine.hidden import Hidden, choose
from areal_ray.engine.objectives import next_token_loss, regularised_loss, token_log_probs
from areal_ray.engine.objectives.distillation import TEACHER, Distillation

pytestmark = pytest.mark.unit

ROWS, VOCABULARY, WIDTH = 12, 50, 8


@pytest.fixture(autouse=True)
def three_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(hidden, "CHUNK_BYTES", 4 * VOCABULARY * 3)


def made(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, ROWS // 2, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (2, ROWS // 2), generator=generator)
    labels[0, :4] = -100  # a whole chunk predicts nothing, and a part of the next
    tensors = [states, weight, *([torch.randn(VOCABULARY, generator=generator)] if bias else [])]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], labels


def with_logits(states, weight, bias=None, finish=None):
    logits = F.linear(states, weight, bias)
    return logits if finish is None else finish(logits)


def capped(logits):
    return torch.tanh(logits / 3.0) * 3.0


@pytest.mark.parametrize("finish", [None, capped, lambda logits: logits / 7])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_the_logits(bias, finish):
    tensors, labels = made(bias=bias)
    outcomes = []
    for make in (with_logits, Hidden):
        output = make(*tensors[:2], tensors[2] if bias else None, finish)
        loss = next_token_loss(output, {"labels": labels})
        outcomes.append([loss, *torch.autograd.grad(3 * loss, tensors)])
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_frozen_output_layer_gets_no_gradient_and_the_states_theirs():
    (states, weight), labels = made(bias=False)
    weight.requires_grad_(False)
    Hidden(states, weight).cross_entropy(labels).backward()
    assert weight.grad is None
    assert states.grad.abs().sum() > 0


def test_without_a_token_to_predict_nothing_changes():
    tensors, labels = made()
    loss = next_token_loss(Hidden(*tensors), {"labels": torch.full_like(labels, -100)})
    loss.backward()
    assert loss == 0
    assert all(not tensor.grad.any() for tensor in tensors)


def test_the_loss_of_bfloat16_states_is_float32():
    tensors, labels = made(torch.bfloat16)
    loss = next_token_loss(Hidden(*tensors), {"labels": labels})
    want = next_token_loss(with_logits(*tensors), {"labels": labels})
    loss.backward()
    assert loss.dtype == torch.float32
    assert {tensor.grad.dtype for tensor in tensors} == {torch.bfloat16}
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("finish", [None, capped])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_regularised_losses_are_those_of_the_logits_and_of_their_definition(z_loss, smoothing, finish):
    tensors, labels = made()
    outcomes = []
    for make in (with_logits, Hidden):
        loss, nll = regularised_loss(make(*tensors, finish), {"labels": labels}, z_loss, smoothing)
        assert not nll.requires_grad
        outcomes.append([loss, nll, *torch.autograd.grad(3 * loss, tensors)])
    logits, predicted = with_logits(*tensors, finish)[labels != -100], labels[labels != -100]
    plain = F.cross_entropy(logits, predicted)
    even = (logits.logsumexp(1) - logits.mean(1)).mean()
    loss = (1 - smoothing) * plain + smoothing * even + z_loss * logits.logsumexp(1).square().mean()
    outcomes.append([loss, plain, *torch.autograd.grad(3 * loss, tensors)])
    for got in outcomes[:2]:
        for want, each in zip(outcomes[2], got, strict=True):
            torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("finish", [None, capped])
def test_log_probabilities_and_their_gradients_are_those_of_the_logits(finish):
    tensors, labels = made()
    factors = torch.linspace(-1, 2, labels.numel()).view_as(labels)  # what a loss makes of each token
    outcomes = []
    for make in (with_logits, Hidden):
        found = token_log_probs(make(*tensors, finish), labels)
        assert found.shape == labels.shape
        assert not found[labels == -100].any()
        outcomes.append([found, *torch.autograd.grad((factors * found).sum(), tensors)])
    want = with_logits(*tensors, finish).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(outcomes[0][0], want * (labels != -100))
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("theirs", [VOCABULARY - 6, VOCABULARY + 6])  # columns of the teacher's logits
@pytest.mark.parametrize("of_states", [False, True])
def test_distillation_is_that_of_the_logits_and_of_its_definition(theirs, of_states):
    tensors, labels = made()
    labels.clamp_(max=VOCABULARY - 7)
    generator = torch.Generator().manual_seed(1)
    teacher = Hidden(tensors[0].detach() + 1, torch.randn(theirs, WIDTH, generator=generator), None, capped)
    logits = capped(F.linear(teacher.states, teacher.weight))
    objective = Distillation("somewhere", temperature=2.0, share=0.3)
    chunked, values = objective.loss(Hidden(*tensors), {"labels": labels, TEACHER: teacher if of_states else logits})
    whole, same = objective.loss(with_logits(*tensors), {"labels": labels, TEACHER: logits})
    columns, predicted = min(theirs, VOCABULARY), labels != -100
    student = (with_logits(*tensors)[predicted][:, :columns] / 2).softmax(1)
    soft = (logits[predicted][:, :columns] / 2).softmax(1)
    divergence = 4 * (soft * (soft.log() - student.log())).sum(1).mean()
    nll = F.cross_entropy(with_logits(*tensors)[predicted], labels[predicted])
    want = 0.7 * nll + 0.3 * divergence
    for loss, parts in ((chunked, values), (whole, same)):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts["divergence"], divergence.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts["cross_entropy"], nll.detach(), rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
        for got, expected in zip(gradients, torch.autograd.grad(want, tensors, retain_graph=True), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_softmax_and_its_sum_keep_their_digits_whatever_the_logits_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=generator)
    logits[1] *= 1e3
    logits[2] = -1e4
    logits[3] = 7.0
    logits[4, 1:] = -torch.inf
    found, norm = normalised(logits, torch.empty_like(logits))
    torch.testing.assert_close(norm, logits.double().logsumexp(1, keepdim=True).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, logits.double().softmax(1).float(), rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("gradients", [False, True])
def test_there_are_never_more_logits_than_a_chunk(gradients):
    tensors, labels = made(bias=False)
    objective = Distillation("somewhere")
    with Largest() as largest, torch.set_grad_enabled(gradients):
        made_of = Hidden(*tensors)
        losses = [
            made_of.cross_entropy(labels),
            made_of.regularised(labels, -100, 0.1, 0.1)[0],
            made_of.log_probs(labels).sum(),
            objective.loss(made_of, {"labels": labels, TEACHER: made_of})[0],
        ]
        if gradients:
            for loss in losses:
                loss.backward()
    assert largest.elements <= VOCABULARY * max(WIDTH, 3) < ROWS * VOCABULARY


def chosen(*overrides, vocabulary=131072, why_not=None, recorded=None):
    sizes = ["train.micro_batch_size=1", "train.seq_len=2048", *overrides]
    return choose(load("conf/experiments/tiny.yaml", sizes), vocabulary, why_not, recorded)


def test_large_logits_are_done_without():
    assert chosen() == "chunked"
    assert chosen(vocabulary=264) == "logits"
    assert chosen("train.seq_len=256") == "logits"


def test_a_run_keeps_to_its_choice_and_the_user_has_the_last_word():
    assert chosen(recorded="logits") == "logits"
    assert chosen(vocabulary=264, recorded="chunked") == "chunked"
    assert chosen("model.loss=logits", recorded="chunked") == "logits"
    assert chosen("model.loss=chunked", vocabulary=264, recorded="logits") == "chunked"


def test_a_model_that_needs_its_logits_has_them():
    assert chosen(why_not="it caps them") == "logits"
    with pytest.raises(ConfigError, match=r"model\.loss: chunked is not for this model: it caps them"):
        chosen("model.loss=chunked", why_not="it caps them")
