"""The starts of tests/methods/formulas are PEFT's: its float32 against ours in float64."""

import dataclasses
import sys
import warnings

import numpy as np
import pytest

from tests.methods import formulas as f

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

X, IN, OUT, RANK, ALPHA = "layer", 12, 8, 3, 5
SCALE = ALPHA / RANK


def base(seed=0):
    """A Linear whose singular values are well apart, and its W (in, out) in float64."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(IN, OUT)
    u, _, vt = torch.linalg.svd(torch.randn(OUT, IN), full_matrices=False)
    with torch.no_grad():
        linear.weight.copy_(u @ torch.diag(0.7 ** torch.arange(OUT)) @ vt)
    return torch.nn.ModuleDict({X: linear}), linear.weight.detach().double().numpy().T.copy()


def started(model, **config):
    """(a0, b0, what remains of W) of PEFT's LoRA under a start."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [X]} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.get_peft_model(model, peft.LoraConfig(**config)).base_model.model[X]
    found = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T, layer.get_base_layer().weight.T
    return [x.detach().double().numpy() for x in found]


def check_same(ours, theirs, w=None, atol=2e-6):
    """Equal leaves, each pair of rows up to one sign; with `w`, PEFT's remaining base is W - s a0^T b0."""
    a, b = ours
    sign = np.sign((a * theirs[0]).sum(1, keepdims=True))
    np.testing.assert_allclose(sign * a, theirs[0], atol=atol)
    np.testing.assert_allclose(sign * b, theirs[1], atol=atol)
    if w is not None:
        np.testing.assert_allclose(w - SCALE * a.T @ b, theirs[2], atol=atol)


def test_pissa():
    model, w = base()
    check_same(f.pissa(w, RANK, SCALE), started(model, init_lora_weights="pissa"), w)


def test_olora():
    model, w = base()
    check_same(f.olora(w, RANK), started(model, init_lora_weights="olora"), w)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode, monkeypatch):
    # PEFT takes a dataclass from the package attrs, which it does not declare.
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, w = base()
    x = torch.randn(40, IN)
    config = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=mode)}
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[X], **config)
    preprocess_corda(model, lora, run_model=lambda: model[X](x))
    scaled = x.double().numpy() / x.max().item()
    ours = f.corda(w, scaled.T @ scaled, RANK, SCALE, mode=mode)
    check_same(ours, started(model, **config), w, atol=2e-5)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("size", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga(direction, size):
    model, w = base()
    _, gradient = base(seed=1)
    model[X]._peft_loraga_grad = torch.tensor(gradient.T, dtype=torch.float32)
    setting = peft.LoraGAConfig(direction=direction, scale=size, stable_gamma=9)
    theirs = started(model, init_lora_weights="lora_ga", lora_ga_config=setting)
    ours = f.lora_ga(gradient, RANK, SCALE, direction=direction, size=size, gamma=9, w=w)
    sign = np.sign((ours[0] * theirs[0]).sum(1, keepdims=True))
    np.testing.assert_allclose(sign * ours[0], theirs[0], atol=1e-5)
    sign = np.sign((ours[1] * theirs[1]).sum(1, keepdims=True))  # rows of different directions: signs of their own
    np.testing.assert_allclose(sign * ours[1], theirs[1], atol=1e-5)
    np.testing.assert_allclose(w - SCALE * theirs[0].T @ theirs[1], theirs[2], atol=2e-6)


def test_orthogonal():
    model, _ = base()
    torch.manual_seed(3)
    theirs = started(model, r=4, init_lora_weights="orthogonal")
    torch.manual_seed(3)
    _ = torch.nn.Linear(IN, 4, bias=False), torch.nn.Linear(4, OUT, bias=False)  # PEFT makes and draws these first
    basis = torch.linalg.qr(torch.randn(4, 4))[0]
    left, right = torch.randn(IN, 2), torch.randn(2, OUT)
    a, b = f.orthogonal(*(x.double().numpy() for x in (basis, left, right)))
    np.testing.assert_allclose(a, theirs[0], atol=1e-6)
    np.testing.assert_allclose(b, theirs[1], atol=1e-6)
    assert np.abs(a.T @ b).max() < 1e-8
    assert min(np.abs(a).max(), np.abs(b).max()) > 0.1


@pytest.mark.parametrize("whiten", [False, True])
def test_eva(whiten):
    model, _ = base()
    torch.manual_seed(2)
    x = torch.randn(64, IN) @ torch.diag(0.6 ** torch.arange(IN)) + 0.5
    setting = peft.EvaConfig(rho=1.0, whiten=whiten)
    lora = {"init_lora_weights": "eva", "eva_config": setting, "r": RANK}
    adapted = peft.get_peft_model(
        Once(model), peft.LoraConfig(target_modules=[X], **lora), low_cpu_mem_usage=True
    ).eval()
    state = peft.get_eva_state_dict(
        adapted, [{"x": x}] * 3, show_progress_bar=False, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    )
    (theirs,) = (v.double().numpy() for v in state.values())
    # Each batch is the same: its singular values grow with the number of batches seen, its directions stay.
    ours, _ = f.eva(np.concatenate([x.double().numpy()] * 2), RANK, whiten=whiten)
    sign = np.sign((ours * theirs).sum(1, keepdims=True))
    np.testing.assert_allclose(sign * ours, theirs, atol=1e-4)


class Once(torch.nn.Module):
    """The layer as a model with keyword inputs."""

    def __init__(self, model):
        super().__init__()
        self.layer = model[X]

    def forward(self, x):
        return self.layer(x)


def test_loftqs_low_rank_part():
    from peft.utils.loftq_utils import _low_rank_decomposition

    _, w = base()
    _, a, b = f.loftq(w, RANK, lambda x: np.round(4 * x) / 4, rounds=1)
    rest = w - np.round(4 * w) / 4
    theirs = _low_rank_decomposition(torch.tensor(rest.T), RANK)
    np.testing.assert_allclose(a.T @ b, (theirs["L"] @ theirs["R"]).numpy().T, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "bounds"),
    [
        (peft.LoraConfig(r=8, target_modules=[X]), {"lora_A": IN}),
        (peft.LoHaConfig(r=8, target_modules=[X]), {"hada_w1_a": 8, "hada_w1_b": IN, "hada_w2_a": 8}),
        (peft.DeloraConfig(r=8, target_modules=[X]), {"delora_A": IN}),
        (peft.HRAConfig(r=8, target_modules=[X]), {"hra_u": 4}),  # drawn as (in, r / 2), each column then twice
    ],
)
def test_bounds_of_uniform_draws(config, bounds):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(torch.nn.ModuleDict({X: torch.nn.Linear(IN, 60)}), config)
    named = dict(adapted.named_parameters())
    for key, fan in bounds.items():
        (x,) = (p.detach().numpy() for name, p in named.items() if key in name)
        assert 0.9 < np.abs(x).max() / f.kaiming_bound(fan) <= 1
