import copy
import os
from contextlib import suppress

import pytest
import torch
from rich.progress import Progress
from torch import nn

import tersetorch as tt
from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import is_live
from tersetorch.methods.selection import find_weights
from tersetorch.recipes import DeepCompressionRecipe, Stage, deep_compression
from tersetorch.recipes.deep_compression import PUBLISHED
from tersetorch.zoo import NETWORKS, LeNet5, LeNet300100, error_rate, fit, load, steps_per_epoch

TRAINING = {"epochs": 1, "lr": 0.1}
OBS = {"method": "obs", "sparsity": 0.5}


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(dropout), nn.Linear(30, 10))


def zeros(model):
    finished = finalize(copy.deepcopy(model))
    return [int((layer.weight == 0).sum()) for layer in finished if isinstance(layer, nn.Linear)]


def distinct(model):
    finished = finalize(copy.deepcopy(model))
    return [layer.weight.unique().numel() for layer in finished if isinstance(layer, nn.Linear)]


def ignore(model, stage):
    pass


def batches(seed=0):
    """64 inputs of the network, whose features depend on each other, 24 at a time."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(64, 20, generator=generator) @ torch.randn(20, 20, generator=generator)).split(24)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_rounds_follow_the_cubic_curve_with_training_after_each():
    seen = []

    def train(model, stage):
        seen.append((stage.name, stage.round, stage.rounds, stage.training.lr, zeros(model)))

    model = network()
    recipe = {"prune": {"sparsity": 0.8, "rounds": 2, "train": TRAINING}}
    assert deep_compression(model, recipe, train) is model
    # 0.8 * (1 - 1/8) = 0.7 of 600 and 300 weights, then 0.8 of them.
    assert seen == [("prune", 1, 2, 0.1, [420, 210]), ("prune", 2, 2, 0.1, [480, 240])]
    assert is_live(model)


def test_ramp_prunes_while_training():
    seen = []

    def train(model, stage):
        for _ in range(12):
            stage.after_step()
            seen.append(zeros(model)[0])

    model = network()
    recipe = {"prune": {"sparsity": 0.5, "ramp_epochs": 2, "frequency": 1, "train": TRAINING | {"epochs": 3}}}
    deep_compression(model, recipe, train, steps_per_epoch=4)
    assert seen == sorted(seen) and 0 < seen[0] < 300
    assert seen[8:] == [300] * 4


def test_a_training_that_does_not_step_is_said():
    recipe = {"prune": {"sparsity": 0.5, "ramp_epochs": 1, "train": TRAINING}}
    with pytest.raises(ValueError, match=r"train must call stage\.after_step\(\) at least 4 times, got 0"):
        deep_compression(network(), recipe, ignore, steps_per_epoch=4)


def test_sharing_leaves_few_values_and_trains_them():
    x, y = torch.randn(64, 20), torch.randint(0, 10, (64,))

    def train(model, stage):
        assert stage.name == "share"
        before = finalize(copy.deepcopy(model))[0].weight.clone()
        fit(model, x, y, **dict(stage.training), batch_size=16)
        after = finalize(copy.deepcopy(model))[0].weight
        assert not torch.equal(before, after)
        assert torch.equal(before == 0, after == 0)

    model = network()
    deep_compression(model, {"share": {"bits": {"0": 2, "3": 3}, "train": TRAINING}}, train)
    assert distinct(model) == [4, 8]


def test_both_stages_keep_zero_among_the_values():
    model = network()
    recipe = {
        "prune": {"sparsity": {"0": 0.9, "3": 0.5}, "rounds": 1, "train": TRAINING},
        "share": {"bits": 3, "train": TRAINING},
    }
    deep_compression(model, recipe, ignore)
    assert zeros(model) == [540, 150]
    assert distinct(model) == [8, 8]


def by_hand(model, data, sparsity, bits, solver="blocked", refine=3):
    prune.obs(model, data, sparsity, solver=solver, refine=refine if solver == "blocked" else 0)
    return model if bits is None else prune.obs(model, data, 0.0, bits=bits, refine=refine)


@pytest.mark.parametrize(
    ("stage", "bits"),
    [
        ({}, None),
        ({}, 3),
        ({"refine": 0}, 2),
        ({"solver": "exactobs", "refine": 1}, {"0": 2, "*": 3}),
    ],
)
def test_obs_prunes_and_shares_as_by_hand_without_training(stage, bits):
    recipe = {"prune": OBS | stage} | ({} if bits is None else {"share": {"bits": bits}})
    model = network()
    assert deep_compression(model, recipe, calibration=iter(batches())) is model
    assert same(model, by_hand(network(), batches(), 0.5, bits, **stage))
    assert zeros(model) == [300, 150]


def test_obs_looks_at_as_many_examples_as_asked_in_whole_batches():
    found = deep_compression(network(), {"prune": OBS | {"calibration": 25}}, calibration=batches())
    assert same(found, by_hand(network(), batches()[:2], 0.5, None))
    labelled = [(x, torch.zeros(len(x))) for x in batches()]
    assert same(deep_compression(network(), {"prune": OBS | {"calibration": 48}}, calibration=labelled), found)
    assert not same(deep_compression(network(), {"prune": OBS | {"calibration": 24}}, calibration=batches()), found)


def test_obs_in_rounds_is_retrained_and_calibrated_again():
    seen = []

    def train(model, stage):
        seen.append((stage.name, stage.round, zeros(model)))
        jitter(model, stage)

    recipe = {"prune": OBS | {"sparsity": 0.8, "rounds": 2, "train": TRAINING}, "share": {"bits": 3, "train": TRAINING}}
    model = deep_compression(network(), recipe, train, calibration=batches())
    assert seen == [("prune", 1, [420, 210]), ("prune", 2, [480, 240]), ("share", 1, [480, 240])]
    expected = network()
    for part, stage in enumerate(("prune", "prune", "share")):
        if stage == "prune":
            prune.obs(expected, batches(), 0.8 * (1 - (1 - (part + 1) / 2) ** 3), refine=3)
        else:
            prune.obs(expected, batches(), 0.0, bits=3, refine=3)
        jitter(expected, Stage(stage, part % 2 + 1, 2, None, lambda: None))
    assert same(model, expected)


class Words(nn.Module):
    """An embedding, and a layer that no data reaches: attention reads its weight itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.words(tokens)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_what_obs_cannot_calibrate_is_shared_by_kmeans():
    data = [torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(0))]
    recipe = {"prune": OBS | {"sparsity": {"out": 0.5}}, "share": {"bits": {"out": 2, "*": 3}}}
    found = deep_compression(Words(), recipe, calibration=data)
    expected = prune.obs(Words(), data, {"out": 0.5}, refine=3)
    prune.obs(expected, data, 0.0, bits=2, refine=3, targets="out")
    assert same(found, quantize.kmeans(expected, 3, targets="*", ignore="out"))
    model = Words()
    for sparsity, name in (({"*out_proj": 0.5}, r"attention\.out_proj"), ({"words": 0.5}, "words")):
        with pytest.raises(ValueError, match=f"must name Linear and Conv layers that inputs reach .* got '{name}'"):
            deep_compression(model, {"prune": OBS | {"sparsity": sparsity}}, calibration=data)
    assert not is_live(model)


def test_what_cannot_be_changed_is_refused_in_a_recipe_s_words():
    recipe = {"prune": {"sparsity": 0.5, "rounds": 1}}
    model = network()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"on it, or name the other layers in recipe\.prune\.sparsity$"):
        deep_compression(model, recipe)
    with pytest.raises(ValueError, match=r"a Linear or Conv layer, got none; name others in recipe\.prune\.sparsity"):
        deep_compression(nn.Sequential(nn.Embedding(4, 3)), recipe)
    fast = tt.convert(nn.Sequential(nn.Linear(8, 4)), plan={"0": "csr"})
    with pytest.raises(ValueError, match=r"got SparseLinear and the like, .*; pass the model that was converted"):
        deep_compression(fast, recipe)


def test_magnitude_needs_no_training_either():
    model = deep_compression(network(), {"prune": {"sparsity": 0.5}, "share": {"bits": 3}})
    assert same(model, quantize.kmeans(prune.magnitude(network(), 0.5), 3))


@pytest.mark.parametrize(("rule", "rate"), [(True, 0.4 * 0.25**0.5), (False, 0.4)])
def test_dropout_rule(rule, rate):
    model = network(dropout=0.4)
    plan = {"sparsity": 0.75, "rounds": 3, "dropout_rule": rule, "train": TRAINING}
    deep_compression(model, {"prune": plan}, ignore)
    assert model[2].p == pytest.approx(rate)


def test_yaml_round_trip(tmp_path):
    recipe = DeepCompressionRecipe.model_validate(
        {
            "prune": {"sparsity": {"fc1": 0.9, "fc*": 0.5}, "ramp_epochs": 2, "train": {"epochs": 3, "lr": 0.1}},
            "share": {"bits": 5, "init": "linear", "train": {"epochs": 1, "lr": 1e-4, "optimizer": "adam"}},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert DeepCompressionRecipe.from_yaml(path) == recipe
    short = DeepCompressionRecipe.from_mapping({"prune": OBS, "share": {"bits": 4}})
    path.write_text(short.to_yaml())
    assert DeepCompressionRecipe.from_yaml(path) == short
    assert DeepCompressionRecipe.from_mapping(short.model_dump()) == short
    stage = short.prune
    assert (stage.rounds, stage.solver, stage.calibration, stage.refine) == (1, "blocked", 512, 3)
    model = network()
    path.write_text("share: {bits: 1, train: {epochs: 1, lr: 0.1}}")
    deep_compression(model, path, ignore)
    assert distinct(model) == [2, 2]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({}, "at least one of prune and share"),
        ({"prune": {"sparsity": 1.0, "rounds": 1, "train": TRAINING}}, r"prune\.sparsity.* less than 1, got 1.0"),
        ({"prune": {"sparsity": {"0": -0.1}, "rounds": 1, "train": TRAINING}}, "greater than or equal to 0, got -0.1"),
        ({"prune": {"sparsity": "0.5", "rounds": 1, "train": TRAINING}}, "got '0.5'"),
        ({"prune": {"sparsity": float("nan"), "rounds": 1, "train": TRAINING}}, "got nan"),
        ({"prune": {"sparsity": 0.5, "train": TRAINING}}, "exactly one of rounds and ramp_epochs"),
        ({"prune": {"sparsity": 0.5, "rounds": 1, "ramp_epochs": 1, "train": TRAINING}}, "exactly one of rounds"),
        ({"prune": {"sparsity": 0.5, "ramp_epochs": 2, "train": TRAINING}}, "ramp_epochs must be at most .* got 2"),
        ({"prune": {"sparsity": 0.5, "rounds": 0, "train": TRAINING}}, r"prune\.rounds.* got 0"),
        ({"share": {"bits": 9, "train": TRAINING}}, "less than or equal to 8, got 9"),
        ({"share": {"bits": 4, "train": {"epochs": 1}}}, r"share\.train\.lr: Field required"),
        ({"share": {"bits": 4, "train": TRAINING | {"lr": 0}}}, r"share\.train\.lr: .*greater than 0, got 0"),
        ({"share": {"bits": 4, "train": TRAINING | {"lr": float("inf")}}}, r"lr: .*finite number, got inf"),
        ({"prune": {"sparsity": 0.5, "ramp_epochs": 1}}, "ramp_epochs must be left out where train is, got 1; add"),
        ({"prune": {"sparsity": 0.5, "rounds": 2}}, "rounds must be 1 where train is left out, got 2; add train"),
        ({"prune": OBS | {"rounds": 2}}, "rounds must be 1 where train is left out, got 2; add train"),
        ({"prune": OBS | {"method": "obd"}}, r"prune\.method: .*'magnitude' or 'obs', got 'obd'"),
        ({"prune": OBS | {"solver": "full"}}, r"prune\.solver: .*'blocked' or 'exactobs', got 'full'"),
        ({"prune": OBS | {"calibration": 0}}, r"prune\.calibration: .*greater than or equal to 1, got 0"),
        ({"prune": OBS | {"calibration": 1.5}}, r"prune\.calibration: .*valid integer, got 1.5"),
        ({"prune": OBS | {"refine": -1}}, r"prune\.refine: .*greater than or equal to 0, got -1"),
        ({"prune": OBS | {"refin": 1}}, r"prune\.refin, where only .* may stand \(did you mean refine\?\)"),
        ({"prune": {"method": "obs"}}, r"prune\.sparsity: Field required"),
        (
            {"prune": OBS | {"ramp_epochs": 1, "train": TRAINING}},
            "ramp_epochs must be left out where method is 'obs', got 1; give rounds, with train",
        ),
        *(
            ({"prune": {"sparsity": 0.5, field: value}}, f"{field} must be left out where method is 'magnitude', got")
            for field, value in (("solver", "blocked"), ("calibration", 512), ("refine", 0))
        ),
        ({"prune": OBS, "share": {"bits": 4, "init": "linear"}}, "share.init must be 'exact' where prune.method is"),
        ({"prune": OBS}, "calibration must be given where recipe.prune.method is 'obs', got None; pass batches"),
        ({"shear": {}}, r"shear, where only prune, share may stand \(did you mean share\?\)"),
        (
            {"prune": {"sparsity": 0.5, "rounds": 1, "train": {"epochs": 1, "lr": 0.1, "momentom": 0.9}}},
            "prune.train.momentom, where only epochs, lr, weight_decay, l1_penalty, optimizer, input_dropout may stand",
        ),
    ],
)
def test_bad_recipes_are_refused_before_anything_changes(recipe, sentence):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        deep_compression(model, recipe, ignore, steps_per_epoch=1)
    assert not is_live(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("stage", ["prune", "share"])
def test_a_pattern_without_a_layer_is_refused_before_anything_changes(stage):
    model = network()
    recipe = {
        "prune": {"sparsity": {"0": 0.5} | ({"fc9": 0.5} if stage == "prune" else {}), "rounds": 1, "train": TRAINING},
        "share": {"bits": {"0": 4} | ({"fc9": 4} if stage == "share" else {}), "train": TRAINING},
    }
    with pytest.raises(ValueError, match="fc9"):
        deep_compression(model, recipe, ignore)
    assert not is_live(model)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"model": "net"}, TypeError, "model must be an nn.Module, got str"),
        ({"recipe": 3}, TypeError, "recipe must be a DeepCompressionRecipe, a mapping, a name or the path .* got int"),
        ({"train": None}, TypeError, r"train must be callable as train\(model, stage\), got NoneType"),
        ({"recipe": {"prune": OBS}, "train": 3}, TypeError, r"train must be callable as .* got int"),
        ({"recipe": {"prune": OBS}, "calibration": torch.ones(9, 20)}, TypeError, "calibration must be an iterable of"),
        ({"recipe": {"prune": OBS}, "calibration": []}, ValueError, "calibration must hold at least one example, got"),
        ({"recipe": {"prune": OBS}, "calibration": [torch.ones(0, 20)]}, ValueError, "calibration must hold at least"),
        ({"steps_per_epoch": None}, ValueError, "steps_per_epoch must be at least 1 .* got None"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1 .* got 0"),
        ({"steps_per_epoch": 1.5}, TypeError, "steps_per_epoch must be an int, got 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    everything = {
        "model": network(),
        "recipe": {"prune": {"sparsity": 0.5, "ramp_epochs": 1, "train": TRAINING}},
        "train": ignore,
        "steps_per_epoch": 1,
    } | arguments
    with pytest.raises(error, match=sentence):
        deep_compression(everything.pop("model"), everything.pop("recipe"), everything.pop("train"), **everything)


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe must be one of alexnet, lenet_300_100, .* got '.*none\.yaml'"):
        deep_compression(network(), tmp_path / "none.yaml", ignore)
    plan, model = {"share": {"bits": 1, "train": TRAINING}}, network()
    with pytest.raises(
        FileNotFoundError, match=r"deep_compression: path must lie in a folder that exists, got .*missing"
    ):
        deep_compression(model, plan, ignore, path=tmp_path / "missing" / "m.terse")
    with pytest.raises(ValueError, match="deep_compression: path must name a file, got the folder"):
        deep_compression(model, plan, ignore, path=tmp_path)
    with pytest.raises(ValueError, match="deep_compression: coders must be one of smallest, fast, got 'quick'"):
        deep_compression(model, plan, ignore, path=tmp_path / "m.terse", coders="quick")
    assert not is_live(model)
    path = tmp_path / "broken.yaml"
    path.write_text("prune: [")
    with pytest.raises(ValueError, match=r"broken\.yaml must be YAML"):
        deep_compression(network(), path, ignore)
    path.write_text("share: {bits: {'0': 2, '1': 3, '0': 4}, train: {epochs: 1, lr: 0.1}}")
    with pytest.raises(ValueError, match=r"broken\.yaml must be YAML, (?s:.)*the key '0' comes twice"):
        deep_compression(network(), path, ignore)
    path.write_text("{prune: {sparsity: {'0': 1.5}, train: 3}, share: {bits: many, train: {epochs: 1, lr: 0.1}}}")
    with pytest.raises(ValueError) as error:
        deep_compression(network(), path, ignore)
    assert str(error.value) == (
        "DeepCompressionRecipe: recipe must have valid fields, got prune.sparsity.0: Input should be less than 1, got "
        "1.5; prune.train: Input should be a mapping, got 3; share.bits: Input should be a valid integer, got 'many'; "
        "mend them there"
    )
    path.write_text("{prune: {sparsity: 0.5, rounds: 1000000000, train: {epochs: 1, lr: 1e-3}}}")
    with pytest.raises(
        ValueError, match=r"got prune\.rounds: Input should be less than or equal to 1000, got 1000000000; "
    ):
        deep_compression(network(), path, ignore)
    path.write_text("just words")
    with pytest.raises(ValueError, match=r"recipe must have valid fields, got .*'just words'"):
        deep_compression(network(), path, ignore)


@pytest.mark.parametrize("lr", ["1e-3", "1E-3", "+1.e-3", "1.0e-3", "10.0e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, lr):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"share: {{bits: 4, train: {{epochs: 1, lr: {lr}}}}}")
    assert DeepCompressionRecipe.from_yaml(path).share.train.lr == 1e-3
    path.write_text("share: {bits: {1e3a: 4, e5: 3}}")
    assert DeepCompressionRecipe.from_yaml(path).share.bits == {"1e3a": 4, "e5": 3}


# Percentages of each layer's weights that are left, and of all: tables 1 to 5 of Deep Compression (2016), and the file
# that SqueezeNet's authors published.
PUBLISHED_PERCENT = {
    "lenet_300_100": ("lenet-300-100", [8, 9, 26], 8, 0.5),
    "lenet_5": ("lenet-5", [66, 12, 8, 19], 8, 0.5),
    "alexnet": ("alexnet", [84, 38, 35, 37, 37, 9, 9, 25], 11, 0.5),
    "vgg16": ("vgg-16", [58, 22, 34, 36, 53, 24, 42, 32, 27, 34, 35, 29, 36, 4, 4, 23], 7.5, 0.5),
    "squeezenet": ("squeezenet-1.0", None, 33.4, 0.5),
}


@pytest.mark.parametrize("name", PUBLISHED_PERCENT)
def test_published_recipes_keep_what_the_papers_keep(name):
    known, percent, total, within = PUBLISHED_PERCENT[name]
    recipe = DeepCompressionRecipe.named(name)
    with torch.device("meta"):
        layers = find_weights(NETWORKS[known]())
    sparsity = recipe.prune.sparsity
    assert all(any(layer.matches(pattern) for layer in layers) for pattern in sparsity)

    def kept(layer):
        fitting = [pattern for pattern in sparsity if layer.matches(pattern)]
        return 1 - sparsity[layer.name if layer.name in fitting else fitting[0]] if fitting else 1.0

    sizes = [layer.weight.numel() for layer in layers]
    if percent is not None:
        assert [100 * kept(layer) for layer in layers] == pytest.approx(percent)
        assert set(recipe.share.bits.values() if isinstance(recipe.share.bits, dict) else [recipe.share.bits]) <= {
            8,
            5,
            6,
        }
    left = sum(kept(layer) * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
    assert 100 * left == pytest.approx(total, abs=within)


def test_published_recipes_are_known_by_name():
    assert set(PUBLISHED) == set(PUBLISHED_PERCENT)
    with pytest.raises(ValueError, match=r"name must be one of alexnet, .*vgg16, got 'lenet'"):
        DeepCompressionRecipe.named("lenet")
    model, seen = LeNet5(), []

    def train(model, stage):
        seen.append((stage.name, stage.training.epochs))
        for _ in range(10):
            stage.after_step()

    deep_compression(model, "lenet_5", train, steps_per_epoch=1)
    assert seen == [("prune", 25), ("share", 6)]
    finalize(model)
    left = [layer.weight.count_nonzero().item() for layer in (model.conv1, model.conv2, model.fc1, model.fc2)]
    assert left == [330, 3_000, 32_000, 950]
    assert [layer.weight.unique().numel() for layer in (model.conv1, model.fc1)] == [256, 32]


def jitter(model, stage):
    """A training that depends on the stage and the weights alone."""
    generator = torch.Generator().manual_seed(stage.round + 10 * (stage.name == "share"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for _ in range(4):
        stage.after_step()


TWO_ROUNDS = {
    "prune": {"sparsity": {"0": 0.8, "3": 0.5}, "rounds": 2, "train": TRAINING},
    "share": {"bits": 3, "train": TRAINING},
}
RAMP = {"prune": {"sparsity": 0.8, "ramp_epochs": 1, "frequency": 1, "train": TRAINING}, "share": TWO_ROUNDS["share"]}


@pytest.mark.parametrize(
    ("recipe", "stopped_at"),
    [(TWO_ROUNDS, 1), (TWO_ROUNDS, 2), (TWO_ROUNDS, 3), (TWO_ROUNDS, None), (RAMP, 1), (RAMP, 2), (RAMP, None)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(recipe, stopped_at, tmp_path):
    whole, model = network(dropout=0.4), network(dropout=0.4)
    deep_compression(whole, recipe, jitter, steps_per_epoch=4)
    calls, stopped = 0, stopped_at

    def train(model, stage):
        nonlocal calls
        calls += 1
        if calls == stopped:
            raise KeyboardInterrupt
        jitter(model, stage)

    with suppress(KeyboardInterrupt):
        deep_compression(model, recipe, train, steps_per_epoch=4, folder=tmp_path / "run")
    stopped, model = None, network(dropout=0.4)
    deep_compression(model, recipe, train, steps_per_epoch=4, folder=tmp_path / "run")
    # Whatever was trained before was not trained again, but for the training that was stopped.
    assert calls == (3 if recipe is TWO_ROUNDS else 2) + (stopped_at is not None)
    assert is_live(model) and model[2].p == whole[2].p < 0.4
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("stopped_at", [1, 2, 3, "share", None])
def test_a_stopped_run_with_obs_goes_on_to_the_same_bits(stopped_at, tmp_path, monkeypatch):
    """What stops it is the call of prune.obs of that number, or a training."""
    recipe = {"prune": OBS | {"rounds": 2, "train": TRAINING}, "share": {"bits": 3, "train": TRAINING}}
    whole = deep_compression(network(dropout=0.4), recipe, jitter, calibration=batches())
    calls, obs = [], prune.obs

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        return obs(*arguments, **options)

    def train(model, stage):
        if stage.name == stopped_at:
            raise KeyboardInterrupt
        jitter(model, stage)

    monkeypatch.setattr(prune, "obs", stops)
    with suppress(KeyboardInterrupt):
        deep_compression(network(dropout=0.4), recipe, train, calibration=batches(), folder=tmp_path / "run")
    model = deep_compression(network(dropout=0.4), recipe, jitter, calibration=batches(), folder=tmp_path / "run")
    assert len(calls) == (3 if stopped_at is None else 4)
    assert same(model, whole) and model[2].p == whole[2].p < 0.4
    for changes, seed in (({"refine": 1}, 0), ({}, 1)):
        other = recipe | {"prune": recipe["prune"] | changes}
        with pytest.raises(ValueError, match="folder must hold a run with the same model and arguments, got another"):
            deep_compression(network(), other, jitter, calibration=batches(seed), folder=tmp_path / "run")


def test_a_folder_of_another_run_is_refused(tmp_path):
    deep_compression(network(), TWO_ROUNDS, jitter, folder=tmp_path)
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0] = 3
    for model, recipe in ((other, TWO_ROUNDS), (network(), RAMP)):
        with pytest.raises(ValueError, match="folder must hold a run with the same model and arguments, got another"):
            deep_compression(model, recipe, jitter, steps_per_epoch=4, folder=tmp_path)
    (tmp_path / "after_3.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"folder must hold each state as it was stored, got .*after_3"):
        deep_compression(network(), TWO_ROUNDS, jitter, folder=tmp_path)
    (tmp_path / "after_3.safetensors").unlink()
    with pytest.raises(ValueError, match="folder must hold the state after step 3, got none"):
        deep_compression(network(), TWO_ROUNDS, jitter, folder=tmp_path)


def test_a_run_stopped_between_a_state_and_its_record_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    from tersetorch.recipes.run_folder import RunFolder

    whole = deep_compression(network(), TWO_ROUNDS, jitter)
    store = RunFolder.store

    def stops(run, **parts):
        if parts.get("done") == 2:
            raise KeyboardInterrupt
        store(run, **parts)

    monkeypatch.setattr(RunFolder, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        deep_compression(network(), TWO_ROUNDS, jitter, folder=tmp_path)
    assert {"after_1.safetensors", "after_2.safetensors"} < {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(RunFolder, "store", store)
    assert same(deep_compression(network(), TWO_ROUNDS, jitter, folder=tmp_path), whole)


def test_a_run_of_another_number_of_ranks_is_refused(tmp_path, monkeypatch):
    from tersetorch.recipes import run_folder

    model = network()
    deep_compression(copy.deepcopy(model), TWO_ROUNDS, jitter, folder=tmp_path)
    monkeypatch.setattr(run_folder, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="folder must hold a run with the same model and arguments"):
        deep_compression(copy.deepcopy(model), TWO_ROUNDS, jitter, folder=tmp_path)


def test_path_stores_what_is_left(tmp_path):
    model, bars = network(), Progress(disable=True)
    deep_compression(model, TWO_ROUNDS, jitter, path=tmp_path / "m.terse", coders="fast", progress=bars)
    again = tt.load(tmp_path / "m.terse")
    counted, saved = bars.tasks
    assert (counted.completed, counted.total) == (3, 3) and saved.description == "saving" and saved.finished
    assert is_live(model)
    finalize(model)
    assert torch.equal(again[0].weight, model[0].weight) and torch.equal(again[3].weight, model[3].weight)
    stored = {tensor.name: tensor for tensor in tt.inspect(tmp_path / "m.terse").tensors}
    assert stored["0.weight"].form.endswith("codebook") and stored["0.weight"].nbytes < 200
    assert not any("contexts" in tensor.coders for tensor in stored.values())
    assert again[0].weight.count_nonzero() == 120


def test_digits_lose_little():
    data = load("digits")
    model = LeNet300100(data.in_features)
    fit(model, data.train_images, data.train_labels, epochs=15, batch_size=32)

    def train(network, stage):
        fit(
            network,
            data.train_images,
            data.train_labels,
            **dict(stage.training),
            batch_size=32,
            after_step=stage.after_step,
        )

    recipe = {
        "prune": {"sparsity": 0.8, "ramp_epochs": 8, "train": {"epochs": 15, "lr": 0.1, "weight_decay": 1e-4}},
        "share": {"bits": 4, "train": {"epochs": 3, "lr": 3e-4, "optimizer": "adam"}},
    }
    before = error_rate(model, data.test_images, data.test_labels)
    steps = steps_per_epoch(len(data.train_images), 32)
    finalize(deep_compression(model, recipe, train, steps_per_epoch=steps))
    assert before < 0.05
    assert error_rate(model, data.test_images, data.test_labels) <= before + 0.01
    for layer in (model.fc1, model.fc2, model.fc3):
        assert (layer.weight == 0).sum() == round(0.8 * layer.weight.numel())
        assert layer.weight.unique().numel() <= 16


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "prune: !!int adam",
        "prune: !!int ''",
        "prune: !!bool x",
        "prune: !!timestamp x",
        "prune: 2001-99-99",
        "[" * 3000,
        "prune: &a {<<: *a}",
        LAUGHS + "prune: *i",
        MERGES + "prune: *i",
        f"share: {{bits: 0x{'f' * 4000}}}",
        f"share: {{bits: {'1:' * 3000}1}}",
        f"share: {{bits: {'1:' * 3000}1.5}}",
    ],
)
def test_yaml_that_no_parser_expects_is_refused_in_a_short_sentence(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must (be YAML|have valid fields), got ") as refusal:
        DeepCompressionRecipe.from_yaml(path)
    assert len(str(refusal.value)) < 10_000


def test_a_file_of_a_recipe_is_short_and_a_regular_one(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(f"x: [1{',1' * 33_000}]")
    with pytest.raises(ValueError, match=r"must name a file of at most 65,536 bytes, got 66,006 in .*long\.yaml"):
        DeepCompressionRecipe.from_yaml(path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="must name a regular file, got the device or pipe"):
        DeepCompressionRecipe.from_yaml(tmp_path / "pipe.yaml")


def test_numbers_of_thousands_of_digits_are_refused_where_they_stand(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(f"share:\n  bits: 0x{'f' * 4000}")
    with pytest.raises(ValueError, match=r"long\.yaml must be YAML, got a number of more than 100 .* in line 2"):
        DeepCompressionRecipe.from_yaml(path)
    with pytest.raises(ValueError, match=r"got share\.bits: .*, got a number of 16610 bits; mend"):
        DeepCompressionRecipe.from_mapping({"share": {"bits": 10**5000}})


@pytest.mark.parametrize("field", ["prune.sparsity", "share.bits"])
def test_files_of_recipes_run_no_regular_expressions(tmp_path, field):
    stage, name = field.split(".")
    plan = {stage: {name: {"re:(a+)+$": 0.5 if stage == "prune" else 4}}}
    recipe = DeepCompressionRecipe.from_mapping(plan)  # the caller's own
    path = tmp_path / "stranger.yaml"
    path.write_text(recipe.to_yaml())
    with pytest.raises(ValueError, match=rf"stranger\.yaml must name layers in {field} by names or globs"):
        deep_compression(network(), path, ignore)
