"""The formulas of tests/methods/formulas are what the real PEFT computes: effective weights, counts, draws, budgets."""

import numpy as np
import pytest

from tests.methods import formulas as f

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.methods.peft_layer import Layer, X  # noqa: E402  (imports torch and PEFT)

IN, OUT = 10, 6


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora):
    layer = Layer(peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=[X]), IN, OUT)
    t, scale = layer.tensors, f.lora_scale(3, 5, rslora=rslora)
    layer.check(f.lora(layer.w, t["lora_A.weight"], t["lora_B.weight"].T, scale))
    assert layer.trained == f.TRAINED["lora"](IN, OUT, 3)


def test_lora_bias():
    layer = Layer(peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=[X]), IN, OUT)
    t, scale = layer.tensors, f.lora_scale(3, 5)
    w = f.lora(layer.w, t["lora_A.weight"], t["lora_B.weight"].T, scale)
    layer.check(w, f.lora_bias(layer.bias, t["lora_B.bias"], scale))


def test_lora_of_a_weight_stored_in_by_out():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(OUT, IN)
    config = peft.LoraConfig(r=3, lora_alpha=5, fan_in_fan_out=True, target_modules=[X])
    layer = Layer(config, IN, OUT, base=conv1d)
    layer.check(f.lora(layer.w, layer.tensors["lora_A.weight"], layer.tensors["lora_B.weight"].T, f.lora_scale(3, 5)))


def test_dora():
    layer = Layer(peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=[X]), IN, OUT)
    t = layer.tensors
    a, b, m = t["lora_A.weight"], t["lora_B.weight"].T, t["lora_magnitude_vector.weight"]
    layer.check(f.dora(layer.w, a, b, m, f.lora_scale(3, 5)))
    assert layer.trained == f.TRAINED["dora"](IN, OUT, 3)


def test_vera():
    layer = Layer(peft.VeraConfig(r=4, target_modules=[X], projection_prng_key=7), IN, OUT)
    t = layer.tensors
    a, b = layer.module.vera_A["default"].numpy(), layer.module.vera_B["default"].numpy().T
    layer.check(f.vera(layer.w, a, b, t["vera_lambda_d"], t["vera_lambda_b"]))
    assert layer.trained == f.TRAINED["vera"](IN, OUT, 4)


def test_vera_projections_are_drawn_without_torch_bit_for_bit():
    model = torch.nn.ModuleDict({X: torch.nn.Linear(50, 20), "other": torch.nn.Linear(30, 40)})
    peft_model = peft.get_peft_model(model, peft.VeraConfig(r=16, target_modules=[X, "other"], projection_prng_key=42))
    a, b = f.vera_draws(16, 50, 40, seed=42)
    np.testing.assert_array_equal(a, peft_model.base_model.vera_A["default"].numpy())
    np.testing.assert_array_equal(b, peft_model.base_model.vera_B["default"].numpy().T)


def test_loha():
    layer = Layer(peft.LoHaConfig(r=3, alpha=5, target_modules=[X]), IN, OUT)
    a1, b1, a2, b2 = (layer.tensors[f"hada_w{k}"] for k in ("1_b", "1_a", "2_b", "2_a"))
    layer.check(f.loha(layer.w, a1, b1.T, a2, b2.T, float(np.float32(5 / 3))))
    assert layer.trained == f.TRAINED["loha"](IN, OUT, 3)


@pytest.mark.parametrize(
    ("size_in", "size_out", "rank", "factor", "both"),
    [
        (12, 6, 1, -1, False),
        (12, 6, 2, -1, False),
        (12, 18, 2, 3, False),
        (48, 36, 2, -1, True),
        (48, 36, 2, 6, True),
        (48, 12, 2, 4, False),
        (40, 18, 3, 4, False),
        (7, 11, 2, -1, False),
        (8, 6, 1, 8, False),
    ],
)
def test_lokr(size_in, size_out, rank, factor, both):
    config = peft.LoKrConfig(r=rank, alpha=5, target_modules=[X], decompose_factor=factor, decompose_both=both)
    layer = Layer(config, size_in, size_out)
    t = layer.tensors
    expected = f.lokr_factored(size_in, size_out, rank, factor=factor, both=both)
    halves = []
    for k, factored in zip("12", expected, strict=True):
        assert (f"lokr_w{k}" not in t) == factored
        halves.append((t[f"lokr_w{k}_b"], t[f"lokr_w{k}_a"].T) if factored else t[f"lokr_w{k}"].T)
    layer.check(f.lokr(layer.w, *halves, f.lora_scale(rank, 5)))
    assert layer.trained == f.TRAINED["lokr"](size_in, size_out, rank, factor=factor, both=both)


def test_axes_are_split_as_peft_splits_them():
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert f.factorized(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(("size_in", "rank"), [(12, 3), (10, 4), (10, 3)])
def test_miss(size_in, rank):
    layer = Layer(peft.MissConfig(r=rank, target_modules=[X]), size_in, OUT)
    b = layer.tensors["miss_block"]
    layer.check(f.miss(layer.w, b))
    assert layer.trained == f.TRAINED["miss"](size_in, OUT, rank)
    if size_in % rank == 0:  # the paper's shards are PEFT's after a permutation of the inputs
        order = np.arange(size_in).reshape(-1, rank).T.ravel()
        np.testing.assert_array_equal(f.miss(layer.w[order], b, shards="contiguous"), f.miss(layer.w, b)[order])


def test_miss_mini():
    layer = Layer(peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=[X]), IN, OUT)
    layer.check(f.miss(layer.w, layer.tensors["miss_block"]))
    assert layer.trained == f.TRAINED["miss_mini"](IN, OUT, 4, 2)


def test_miss_bat():
    layer = Layer(peft.MissConfig(r=2, init_weights="bat", target_modules=[X]), IN, OUT)
    w = f.miss_bat(layer.w, layer.tensors["miss_block"])
    layer.check(w)
    assert np.linalg.matrix_rank(w - layer.w) == OUT
    assert layer.trained == f.TRAINED["miss_bat"](IN, OUT, 2)


def test_delora():
    layer = Layer(peft.DeloraConfig(r=3, delora_lambda=5, target_modules=[X]), IN, OUT)
    t = layer.tensors
    np.testing.assert_allclose(t["delora_w_norm"], np.linalg.norm(layer.w, axis=1), rtol=1e-14)
    layer.check(f.delora(layer.w, t["delora_A"], t["delora_B"].T, t["delora_lambda"].item()))
    assert layer.trained == f.TRAINED["delora"](IN, OUT, 3)


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
def test_hra(rank, gram_schmidt):
    layer = Layer(peft.HRAConfig(r=rank, apply_GS=gram_schmidt, target_modules=[X]), IN, OUT)
    layer.check(f.hra(layer.w, layer.tensors["hra_u"].T, gram_schmidt=gram_schmidt))
    assert layer.trained == f.TRAINED["hra"](IN, OUT, rank)


@pytest.mark.parametrize("feedforward", [True, False])
def test_ia3(feedforward):
    config = peft.IA3Config(target_modules=[X], feedforward_modules=[X] if feedforward else [])
    layer = Layer(config, IN, OUT)
    gain = layer.tensors["ia3_l"].ravel()
    layer.check(*f.ia3(layer.w, gain, feedforward=feedforward, bias=layer.bias))
    assert layer.trained == f.TRAINED["ia3_feedforward" if feedforward else "ia3"](IN, OUT)


@pytest.mark.parametrize("alpha", [5, 0])
def test_adalora(alpha):
    layer = Layer(peft.AdaLoraConfig(init_r=3, lora_alpha=alpha, total_step=10, target_modules=[X]), IN, OUT)
    t = layer.tensors
    scale = (alpha or 3) / (3 + 1e-5)
    layer.check(f.adalora(layer.w, t["lora_A"], t["lora_E"].ravel(), t["lora_B"].T, scale))
    assert layer.trained == f.TRAINED["adalora"](IN, OUT, 3)


def test_adaloras_budget_scores_and_penalty():
    from peft.tuners.adalora.layer import RankAllocator

    torch.manual_seed(0)
    names = ["one", "two", "three"]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(5, 4) for name in names})
    schedule = {"tinit": 3, "tfinal": 5, "total_step": 20}
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, deltaT=2, beta1=0.7, beta2=0.6, target_modules=names, init_lora_weights=False, **schedule
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    allocator = RankAllocator(model, config, "default")
    budget = {"start": 12, "target": 6, "warmup": 3, "final": 5, "total": 20}
    for step in range(25):
        assert allocator.budget_schedule(step)[0] == f.adalora_budget(step, **budget)
    layers = [model.base_model.model[name] for name in names]
    leaves = [[getattr(m, f"lora_{k}")["default"] for k in "AEB"] for m in layers]
    state = [[(0.0, 0.0)] * 3 for _ in layers]
    for _ in range(3):
        for site, leaf in enumerate(leaves):
            for k, p in enumerate(leaf):
                p.grad = torch.randn_like(p)
                x, g = p.detach().numpy(), p.grad.numpy()
                state[site][k] = f.adalora_smoothed(*state[site][k], x, g, 0.7, 0.6)
        allocator.update_ipt(model)
    ours = []
    for (ia, ua), (ie, ue), (ib, ub) in state:
        ours.append(f.adalora_scores((ia, ua), (ie.ravel(), ue.ravel()), (ib.T, ub.T)))
    kept = allocator.mask_to_budget(model, 7)
    masks = f.adalora_keep(ours, 7)
    assert sum(m.sum() for m in masks) == 7
    for name, mask in zip(names, masks, strict=True):
        assert kept[f"base_model.model.{name}.lora_E.default"] == mask.tolist()
    model.base_model.model.forward = lambda: type("Out", (), {"loss": torch.zeros((), dtype=torch.float64)})()
    pairs = [(a.detach().numpy(), b.detach().numpy().T) for a, _, b in leaves]
    expected = 0.5 * f.adalora_penalty(pairs, squared=False)
    np.testing.assert_allclose(model.base_model.forward().loss.item(), expected, rtol=1e-12)
