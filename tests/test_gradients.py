"The barriers of the generation path, their removal one by one, and the reach of adapters and routes."
import numpy as np
import pytest
import torch
from terratorch.models.backbones.terramind.model.generate import GenerationSampler
from terratorch.models.backbones.terramind.model.terramind import TerraMind
from terratorch.models.backbones.terramind.tokenizer.scheduling.diffusion_pipeline import PipelineCond

from gac.core.files import GacError
from gac.models.build import build_model
from gac.models.diffusion import scheduler_for
from gac.models.generator import build_generator
from gac.models.gradient_flow.barriers import (
    BARRIERS,
    STOPS,
    dissect,
    generate_through,
    group_of,
    make_batch,
    probe_gradients,
    undecorated,
    without_barriers,
)
from gac.models.gradient_flow.costs import cost_of, score_function
from gac.models.gradient_flow.routes import GRADIENT_ROUTES, Route, route_reach, train, trainable, unreached, with_lora
from gac.models.gradient_flow.survey import reinit_zero_layers, survey
from gac.models.mini import CORE
from gac.training.order import seeded

TOKEN_MODEL = {'encoder embeddings', 'encoder', 'cross-attention', 'decoder', 'output embedding'}
EXPECTED = {'as shipped': set(), '− pipeline no_grad': {'UNet'}, '− code lookup': {'UNet'}, '− choice': {'UNet'},
            '− sampler no_grad': TOKEN_MODEL | {'codes', 'UNet'}, '− clamp': TOKEN_MODEL | {'codes', 'UNet'},
            'only pipeline no_grad left': set(), 'only code lookup left': {'UNet'}, 'only choice left': {'UNet'},
            'only sampler no_grad left': {'UNet'}}

@pytest.fixture(scope='module')
def generator():
    "Return the miniature with random weights: no property below depends on its training."
    with seeded(0): model = build_generator(pretrained=False)
    reinit_zero_layers(model)
    return model

@pytest.fixture(scope='module')
def encoder():
    with seeded(0): return build_model('terramind_mini', pretrained=False, modalities=['S1GRD'])

def tile(generator, size=24, n=1):
    r = np.random.default_rng(0)
    return make_batch(generator, r.normal(-15, 3, (n, 2, size, size)), r.uniform(0, .5, (n, 12, size, size)), size)

@pytest.fixture(scope='module')
def batch(generator): return tile(generator)

def reached(table) -> set: return set(table.module[table.params_with_grad > 0])

def dissected(generator, batch) -> dict: return {k: reached(t) for k, t in dissect(generator, batch, steps=2).items()}

def test_the_library_has_these_barriers_and_each_is_one_by_itself(generator, batch):
    assert dissected(generator, batch) == EXPECTED
    shipped = probe_gradients(generator, batch)
    assert 'does not require grad' in shipped.attrs['error']
    assert set(shipped.verdict) == {'backward raises', 'not on this route'}

@pytest.mark.parametrize('method', ['forward_encoder', 'forward_decoder', 'forward_logits'])
def test_another_barrier_on_the_path_would_be_seen(generator, batch, method, monkeypatch):
    plain = getattr(TerraMind, method)
    monkeypatch.setattr(TerraMind, method, torch.no_grad()(plain))
    assert dissected(generator, batch) != EXPECTED

@pytest.mark.parametrize('owner, name, barrier', [(GenerationSampler, 'generate', 'sampler no_grad'),
                                                  (PipelineCond, '__call__', 'pipeline no_grad')])
def test_a_barrier_that_is_gone_is_named(generator, batch, owner, name, barrier, monkeypatch):
    monkeypatch.setattr(owner, name, undecorated(getattr(owner, name)))
    with pytest.raises(GacError, match=r'not under torch.no_grad\(\)'): probe_gradients(generator, batch, [barrier])

def test_a_clamp_that_is_gone_is_named(generator, batch):
    scheduler = generator.tokenizer().noise_scheduler
    old = dict(thresholding=scheduler.config.thresholding, clip_sample=scheduler.config.clip_sample)
    scheduler.register_to_config(thresholding=False, clip_sample=False)
    try:
        with pytest.raises(GacError, match='does not limit'): probe_gradients(generator, batch, ['clamp'])
    finally: scheduler.register_to_config(**old)

def test_a_choice_made_elsewhere_is_noticed(generator, batch, monkeypatch):
    "Were tokens permuted after the choice, the tape would not fit them."
    step = GenerationSampler.roar_step_batched
    def shuffled(self, mod_dict, target, *args, **kw):
        out = step(self, mod_dict, target, *args, **kw)
        out[target]['tensor'] = out[target]['tensor'].flip(-1)
        return out
    monkeypatch.setattr(GenerationSampler, 'roar_step_batched', shuffled)
    with pytest.raises(GacError, match='disagree'): probe_gradients(generator, batch, STOPS)

@pytest.mark.parametrize('temperature', [1., 0.])
def test_removal_changes_no_value_and_leaves_nothing_behind(generator, batch, temperature, monkeypatch):
    "At temperature 0 the choice is torch.argmax, else torch.multinomial."
    monkeypatch.setattr(generator.core, 'temps', temperature)
    quantiser, scheduler = generator.tokenizer().quantize, generator.tokenizer().noise_scheduler
    state = lambda: (PipelineCond.__call__, GenerationSampler.generate, torch.multinomial, torch.argmax,
                     list(vars(quantiser)), list(vars(generator.core.sampler)), dict(scheduler.config))
    before = state()
    shipped, _ = generate_through(generator, batch)
    for k in range(1, len(STOPS) + 1):
        image, tape = generate_through(generator, batch, STOPS[:k])
        assert torch.allclose(image, shipped, atol=1e-4), STOPS[:k]
    image.square().mean().backward()
    assert tape.codes.grad.abs().sum() > 0 and generator.net.mask_token.grad.abs().sum() > 0
    with pytest.raises(ZeroDivisionError):
        with without_barriers(generator, BARRIERS): 1/0
    assert all(a == b for a, b in zip(state(), before))
    assert torch.equal(generate_through(generator, batch)[0], shipped)

def test_the_clamp_takes_the_gradient_of_what_it_holds(generator):
    scheduler = scheduler_for(generator.tokenizer())
    scheduler.set_timesteps(1, mode='trailing')
    out = torch.tensor([.5, 3.]).reshape(1, 1, 1, 2).requires_grad_()
    scheduler.step(out, scheduler.timesteps[0], torch.zeros_like(out)).prev_sample.sum().backward()
    assert (out.grad != 0).flatten().tolist() == [True, False]

@pytest.mark.parametrize('name', GRADIENT_ROUTES)
def test_a_route_reaches_all_it_passes_and_nothing_else(generator, encoder, batch, name):
    route = Route(name, encoder if name == 'encoder' else generator, generator, steps=2)
    table = route_reach(route, batch)
    assert reached(table) == set(GRADIENT_ROUTES[name])
    assert (table.verdict[~table.module.isin(GRADIENT_ROUTES[name])] == 'not on this route').all()

def adapted(name, lora=True):
    with seeded(0):
        model = build_model('terramind_mini', pretrained=False,
                                  modalities=['S1GRD']) if name == 'encoder' else build_generator(pretrained=False)
    reinit_zero_layers(model)
    reads = build_generator(pretrained=False) if name == 'encoder' else model
    route = Route(name, model, reads)
    return route, with_lora(route, lora=lora)

@pytest.mark.parametrize('name', GRADIENT_ROUTES)
def test_adapters_sit_where_they_should_all_learn_and_the_loss_falls(name):
    route, hit = adapted(name)
    depth = CORE['encoder_depth' if name == 'encoder' else 'decoder_depth']
    assert len(hit) == depth*(2 if name == 'encoder' else 3)
    groups = {group_of(n) for n in trainable(route)}
    assert groups == ({'encoder', 'head'} if name == 'encoder'
                      else {'cross-attention'} | ({'head'} if 'head' in GRADIENT_ROUTES[name] else set()))
    frozen = {n: p.detach().clone() for n, p in route.named_parameters() if not p.requires_grad}
    # its image moves only where a token's best code changes: larger steps, and the best of them
    hard = name == 'straight-through'
    losses = train(route, tile(route.reads), 8 if hard else 4, 1e-2 if hard else 1e-3)
    assert min(losses[1:]) < losses[0] and unreached(route) == []
    assert all(torch.equal(p, frozen[n]) for n, p in route.named_parameters() if n in frozen)

def test_the_shipped_generator_gives_its_adapters_nothing():
    "Stage 3 as first described: adapters on the cross-attention, a loss on the image the generator draws."
    route, _ = adapted('tokens')
    image, _ = generate_through(route.model, tile(route.model))
    with pytest.raises(RuntimeError, match='does not require grad'): image.mean().backward()
    image, _ = generate_through(route.model, tile(route.model), ['pipeline no_grad'])
    # the UNet is frozen now: still nothing
    with pytest.raises(RuntimeError, match='does not require grad'): image.mean().backward()
    assert set(unreached(route)) == set(trainable(route)) != set()

def test_without_adapters_only_the_head_learns():
    route, hit = adapted('features', lora=False)
    assert hit.empty and {group_of(n) for n in trainable(route)} == {'head'}

def test_memory_grows_with_the_diffusion_steps():
    route, _ = adapted('expected code')
    rows = [cost_of(route, tile(route.reads), k, 1) for k in (1, 4)]
    assert rows[1]['peak_memory_mb'] > rows[0]['peak_memory_mb'] > sum(p.numel() for p in route.parameters())*4e-6
    assert (list(rows[0]) == ['device', 'method', 'steps', 'precision', 'batch', 'ms_per_tile', 'tiles_per_s',
                              'peak_memory_mb', 'params', 'trainable'])

def test_the_score_function_estimate_agrees_with_the_exact_gradient():
    "One token, 5 codes, a quadratic loss: the gradient by θ is known."
    p, book = torch.tensor([.1, .2, .3, .25, .15]), torch.linspace(0, 1, 5)[:, None]
    theta = torch.zeros(1, requires_grad=True)
    q = (p.log() + book @ theta).softmax(-1)
    exact, = torch.autograd.grad((q*(book[:, 0] - .8)**2).sum(), theta)
    picked = book[torch.multinomial(p, 200_000, True, generator=torch.Generator().manual_seed(0))][:, None]
    estimate = score_function((picked[:, 0, 0] - .8)**2, picked, (p @ book)[None])
    assert float(estimate) == pytest.approx(float(exact), abs=2e-3)

@pytest.mark.slow
def test_the_library_itself_has_the_same_barriers_and_routes():
    "terramind_v1_tiny_generate as TerraTorch builds it, 300 M random parameters, one tile of 96 px."
    with seeded(0):
        big = build_generator('terramind_v1_tiny_generate', pretrained=False)
        encoder = build_model('terramind_v1_tiny', pretrained=False, modalities=['S1GRD'])
    reinit_zero_layers(big)
    flow, notes = survey(big, encoder, tile(big, 96), 'library')
    got = {route: reached(part) for route, part in flow.groupby('route')}
    assert got == EXPECTED | {k: set(v) for k, v in GRADIENT_ROUTES.items()}
    assert 'does not require grad' in notes['as shipped']['error']
