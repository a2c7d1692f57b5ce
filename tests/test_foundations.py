"Weights in the Hub's format: full-size random files are loaded to the last tensor, and refused if one is wrong."
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gac.core.files import GacError, root
from gac.core.vocabulary import OPT_BANDS, OPT_INDEX, S2_BANDS
from gac.models.blank import build_blank, model_info
from gac.models.build import build_model, save_weights, weights_checksums
from gac.models.clamp import clip_error
from gac.models.features import encode_features
from gac.models.generator import TOKENS, Generator, build_generator, spare
from gac.models.mini import TERRAMIND_KEY_STATS, mini_core
from gac.models.modalities import MODALITIES
from gac.models.registry import MODELS, model_entry
from gac.models.sampling import tile_generator
from gac.models.true_tiles import true_tiles
from gac.models.weights import _ties, load_checked, locate, needed_files, read_weights

TINY, TOKENIZER = 'terramind_v1_tiny_generate', 'terramind_v1_tokenizer_s2l2a'

def numbers(model, seed:int) -> dict:
    "Random tensors for every key of a model, cheaply: slices of one pool, every tensor another slice."
    draw = torch.Generator().manual_seed(seed)
    pool, out = torch.randn(6_000_000, generator=draw)*.03, {}
    params = dict(model.named_parameters(remove_duplicate=False))
    for k, v in model.state_dict().items():
        if k not in params: out[k] = v.clone(); continue
        start = int(torch.randint(0, len(pool) - v.numel(), (), generator=draw))
        out[k] = (pool[start:start + v.numel()].reshape(v.shape).clone()
                  + (k.endswith('norm.weight') or v.ndim == 1 and k.endswith('weight')))
    for names in _ties(model):
        for k in names[1:]: out[k] = out[names[0]]
    return out

def hub_state(size:str) -> dict:
    "Return the content of a TerraMind file on the Hub: the token model over all modalities, unprefixed."
    model = build_blank(f'terramind_v1_{size}_generate', memory=False, modalities=list(MODALITIES),
                    output_modalities=list(MODALITIES))
    return numbers(model.sampler.model, 1)

def put(cache:Path, name:str, state:dict) -> Path:
    "Write a file as the Hugging Face cache lays it out."
    e, rev = model_entry(name), '0123abcd'
    base = cache/f'models--{e.repo.replace("/", "--")}'
    (base/'refs').mkdir(parents=True); (base/'snapshots'/rev).mkdir(parents=True)
    (base/'refs'/'main').write_text(rev)
    torch.save(state, base/'snapshots'/rev/e.file)
    return base/'snapshots'/rev/e.file

@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    "Make a cache with TerraMind tiny and the S2L2A tokenizer, 1.3 GB; remove it at the end."
    folder = tmp_path_factory.mktemp('hub')
    put(folder, TINY, hub_state('tiny'))
    put(folder, TOKENIZER, numbers(build_blank(TOKENIZER, memory=False), 2))
    yield folder
    shutil.rmtree(folder)

@pytest.fixture
def hub(cache, monkeypatch, tmp_path):
    "Make the cache the only source of weights."
    monkeypatch.setenv('HF_HUB_CACHE', str(cache)); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    return cache

@pytest.fixture(scope='session')
def states(cache) -> dict:
    "Return the tensors of both files, by the model's names."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HF_HUB_CACHE', str(cache)); m.setenv('HF_HUB_OFFLINE', '1')
        return {w.file: read_weights(p) for w, p in locate(TINY).items()}

@pytest.fixture(scope='session')
def generator(cache) -> Generator:
    with pytest.MonkeyPatch.context() as m:
        m.setenv('HF_HUB_CACHE', str(cache)); m.setenv('HF_HUB_OFFLINE', '1')
        return build_generator(TINY, timesteps=1)

def test_every_tensor_of_the_files_arrives(generator, states):
    model, used, spare = generator.core.state_dict(), 0, 0
    (core, core_state), (tok, tok_state) = states.items()
    for k, v in core_state.items():
        home = f'sampler.model.{k}'
        if home in model: assert torch.equal(model[home], v), k; used += 1
        else: assert k.startswith(('encoder_embeddings.', 'decoder_embeddings.')), k; spare += 1
    for k, v in tok_state.items(): assert torch.equal(model[f'tokenizer.tok_sen2l2a@224.{k}'], v), k
    assert used + len(tok_state) == len(model) and spare  # nothing in the model came from elsewhere

def test_tied_parameters_stay_one(generator):
    embedding = generator.net.decoder_embeddings['tok_sen2l2a@224']
    assert embedding.to_logits.weight is embedding.token_emb.weight

def drop(s): del s['encoder.3.mlp.fc1.weight']
def rename(s): s['encoder.3.mlp.fc_1.weight'] = s.pop('encoder.3.mlp.fc1.weight')
def reshape(s): s['decoder.0.cross_attn.kv.weight'] = s['decoder.0.cross_attn.kv.weight'][:, :100]
def add(s): s['encoder.12.norm1.weight'] = torch.ones(192)
def disguise(s):
    # of a modality that is not built, but not its name
    s['encoder_embeddings.untok_dem@224.projection.weight'] = torch.ones(192)
def prefix(s): renamed = {f'module.{k}': v for k, v in s.items()}; s.clear(); s.update(renamed)
def untie(s):
    s['decoder_embeddings.tok_sen2l2a@224.to_logits.weight'] = (s['decoder_embeddings.tok_sen2l2a@224.to_logits.weight']
                                                                + 1)
def integers(s): s['mask_token'] = torch.zeros(1, 1, 192, dtype=torch.long)

@pytest.mark.parametrize('harm,words',
                         [(drop, ['1 missing: sampler.model.encoder.3.mlp.fc1.weight']),
                          (rename,
                           ['1 missing: sampler.model.encoder.3.mlp.fc1.weight',
                            '1 unexpected: encoder.3.mlp.fc_1.weight']),
                          (reshape,
                           ['1 misshapen: sampler.model.decoder.0.cross_attn.kv.weight is (384, 100) in the file and '
                            '(384, 192) in the model']),
                          (add, ['1 unexpected: encoder.12.norm1.weight']),
                          (disguise, ['1 unexpected: encoder_embeddings.untok_dem@224.projection.weight']),
                          (prefix, ['246 missing: ', 'and 236 more', ' unexpected: module.']),
                          (untie, ['1 untied: sampler.model.decoder_embeddings.tok_sen2l2a@224.to_logits.weight']),
                          (integers, ['1 misshapen: sampler.model.mask_token']),],
                         ids=lambda v: getattr(v, '__name__', ''))
def test_a_changed_file_is_refused_by_name(states, harm, words):
    parts = [(file, dict(state), w) for (file, state), w in zip(states.items(), needed_files(TINY))]
    harm(parts[0][1])
    with pytest.raises(GacError) as refusal: load_checked(build_blank(TINY, memory=False), parts)
    for word in ['TerraMind_v1_tiny.pt', *words]: assert word in str(refusal.value)

def test_a_changed_tokenizer_is_refused_by_name(states):
    parts = [(file, dict(state), w) for (file, state), w in zip(states.items(), needed_files(TINY))]
    del parts[1][1]['quant_proj.weight']; parts[1][1]['decoder.extra'] = torch.zeros(1)
    with pytest.raises(GacError,
                       match=r'1 missing: tokenizer.tok_sen2l2a@224.quant_proj.weight; 1 unexpected: decoder.extra'):
        load_checked(build_blank(TINY, memory=False), parts)

def test_generates_96_pixels_in_one_step_as_terratorch_would(generator):
    s1 = torch.randn(2, 2, 96, 96)*4 - 14
    python, torch_state, given = random.getstate(), torch.get_rng_state(), {'S1GRD': s1.clone()}
    image = generator.generate(given, tokens='argmax', clamp='off', bands=S2_BANDS, tile_seeds=[5, 6])
    assert image.shape == (2, 12, 96, 96) and image.std() > .01
    assert torch.equal(given['S1GRD'], s1) and random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)
    alone = generator.generate(s1[1:], tokens='argmax', clamp='off', bands=S2_BANDS, tile_seeds=[6])
    assert (alone - image[1:]).abs().max() < 1e-5*image.abs().max().clamp(min=1)
    with torch.no_grad(): tokens = generator.token_logits(s1[1:]).argmax(-1).reshape(1, 6, 6)
    tok = generator.tokenizer()
    tok.noise_scheduler.register_to_config(thresholding=False, clip_sample=False)
    theirs = tok.decode_tokens(tokens, timesteps=1, image_size=96, generator=tile_generator(0, '6', 0, 'noise'))
    tok.noise_scheduler.register_to_config(thresholding=True, clip_sample=True)
    assert torch.allclose(generator.units.outward(theirs, 'tok_sen2l2a@224'), alone, atol=1e-4)

def test_an_encoder_reads_the_same_file(hub, states):
    state = next(iter(states.values()))
    model = build_model('terramind_v1_tiny', modalities=['S2L2A'], bands=OPT_BANDS)
    assert torch.equal(model.encoder[11].attn.qkv.weight, state['encoder.11.attn.qkv.weight'])
    full = state['encoder_embeddings.untok_sen2l2a@224.proj.weight'].reshape(192, 256, 12)
    assert torch.equal(model.encoder_embeddings['untok_sen2l2a@224'].proj.weight,
                       full[..., list(OPT_INDEX)].reshape(192, -1))
    assert encode_features(model, {'S2L2A': torch.rand(1, 4, 120, 120)}).shape == (1, 64, 192)

def test_checksums_are_those_of_the_files(hub):
    import hashlib
    path = locate('terramind_v1_tiny')
    assert (weights_checksums('terramind_v1_tiny') == {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                                                       for p in path.values()})

def test_files_may_lie_side_by_side(hub, tmp_path):
    source = next(iter(locate('terramind_v1_tiny').values()))
    (tmp_path/source.name).symlink_to(source)
    assert list(locate('terramind_v1_tiny', weights=tmp_path).values()) == [tmp_path/source.name]
    with pytest.raises(GacError) as refusal: locate(TINY, weights=tmp_path)
    assert 'needs 1 file(s)' in str(refusal.value)
    assert f'put it at {tmp_path/"TerraMind_Tokenizer_S2L2A.pt"}' in str(refusal.value)
    assert next(iter(locate('terramind_v1_tiny', weights=hub).values())) == source  # or in the cache's layout

def test_offline_every_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path)); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(GacError) as refusal: build_model('terramind_v1_small_tim', tim_modalities=['LULC', 'NDVI'])
    for word in ('needs 3 file(s)', 'HF_HUB_OFFLINE is set', 'TerraMind_v1_small.pt', 'TerraMind_Tokenizer_LULC.pt',
                 'TerraMind_Tokenizer_NDVI.pt', 'data/weights', 'ibm-esa-geospatial/TerraMind-1.0-small'):
        assert word in str(refusal.value)

class Mischief:
    def __reduce__(self): return os.mkdir, ('executed',)

@pytest.mark.parametrize('content', ['cut', 'text', 'pickle', 'list'])
def test_a_file_that_is_no_table_of_tensors(hub, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path/'TerraMind_v1_tiny.pt'
    if content == 'cut': path.write_bytes(next(iter(locate('terramind_v1_tiny').values())).read_bytes()[:10_000_000])
    if content == 'text': path.write_text('<html>not found</html>')
    if content == 'pickle': path.write_bytes(pickle.dumps({'encoder': Mischief()}))
    if content == 'list': torch.save([torch.zeros(1)], path)
    with pytest.raises(GacError, match='TerraMind_v1_tiny.pt'): read_weights(path)
    assert not Path('executed').exists()

def test_prithvi_takes_its_bands_by_name(tmp_path):
    "From a file as published: the whole autoencoder, six bands, four frames."
    from terratorch.models.backbones.prithvi_vit import _create_prithvi
    e = model_entry('prithvi_eo_v2_tiny_tl')
    published = _create_prithvi('prithvi_eo_v2_tiny_tl', num_frames=4, encoder_only=False)
    torch.save(published.state_dict(), tmp_path/e.file)
    model = build_model(e.name, weights=tmp_path, bands=('B08', 'B02'))
    weight = published.encoder.patch_embed.proj.weight
    assert torch.equal(model.patch_embed.proj.weight, weight[:, [3, 0]])  # NIR_NARROW and BLUE
    theirs = _create_prithvi('prithvi_eo_v2_tiny_tl', pretrained=True, ckpt_path=tmp_path/e.file,
                             model_bands=['NIR_NARROW', 'BLUE'])
    for k, v in theirs.state_dict().items(): assert torch.equal(model.state_dict()[k], v), k
    with pytest.raises(GacError, match='Unknown band B10'): build_model(e.name, weights=tmp_path, bands=('B10',))
    state = published.state_dict(); state['encoder.block.0.norm1.weight'] = state.pop('encoder.blocks.0.norm1.weight')
    torch.save(state, tmp_path/e.file)
    with pytest.raises(GacError, match=r'1 missing: blocks.0.norm1.weight; 1 unexpected: encoder.block.0.norm1.weight'):
        build_model(e.name, weights=tmp_path)

def test_every_name_is_counted_without_memory():
    for name in MODELS: assert model_info(name)['params'] > 1e5
    assert model_info('terramind_v1_base')['params'] == pytest.approx(87.7e6, rel=.01)
    assert model_info('terramind_v1_large_generate')['params'] == pytest.approx(1011e6, rel=.01)

def test_the_miniatures_load_from_terratorchs_registry(tmp_path):
    from terratorch.registry import BACKBONE_REGISTRY
    torch.manual_seed(0)
    save_weights(tmp_path/'terramind_mini.safetensors', mini_core().state_dict())
    model = BACKBONE_REGISTRY.build('terramind_mini', pretrained=True, weights=str(tmp_path), modalities=['S1GRD'])
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model.state_dict()['encoder.0.attn.qkv.weight'].half(),
                       load_file(tmp_path/'terramind_mini.safetensors')['encoder.0.attn.qkv.weight'])

def test_the_clamp_on_real_tiles(real_data):
    "What clipping alone costs, measured on the five TerraMesh tiles (RMSE in DN)."
    source, truth = true_tiles()
    stats = TERRAMIND_KEY_STATS['tok_sen2l2a@224']
    rmse = {k.split('_')[0]: clip_error(x, stats).rmse.round().tolist() for k, x in truth.items()}
    assert source == 'real: terramesh' and rmse['282D'] == [3, 31, 58, 599] and rmse['609U'] == [3577, 2922, 2988, 2571]

MINI = root()/'data'/'weights'/'mini'

@pytest.mark.skipif(not any(MINI.glob('*.safetensors')), reason='the miniature weights are not in data/weights/mini')
def test_the_committed_weights_fit():
    assert sum(p.stat().st_size for p in MINI.iterdir()) < 30e6
    for name in MODELS:
        if not model_entry(name).mini: continue
        build_model(name)
        assert (MINI/model_entry(name).file).with_suffix('.json').is_file(), f'{name} has no card'

@pytest.mark.slow
def test_terratorchs_own_pretrained_path_gives_the_same_model(hub, generator, monkeypatch):
    from terratorch.models.backbones.terramind.model import terramind_register
    from terratorch.models.backbones.terramind.tokenizer import tokenizer_register
    from terratorch.registry import TERRATORCH_FULL_MODEL_REGISTRY
    files = {w.repo: p for w, p in locate(TINY).items()}
    for module in (terramind_register, tokenizer_register):
        monkeypatch.setattr(module, 'hf_hub_download', lambda repo_id, filename: files[repo_id])
    theirs = TERRATORCH_FULL_MODEL_REGISTRY.build(TINY, pretrained=True, modalities=['S1GRD'],
                                                  output_modalities=['S2L2A']).state_dict()
    for k, v in generator.core.state_dict().items(): assert torch.equal(theirs[k], v), k

@pytest.mark.slow
def test_thinking_and_diffusion_at_full_size(hub, generator, tmp_path):
    "TiM needs the land-cover tokenizer (0.7 GB); ten steps at 120 px in a batch and alone."
    lulc = model_entry('terramind_v1_tokenizer_lulc')
    torch.save(numbers(build_blank(lulc.name, memory=False), 3), tmp_path/lulc.file)
    core = next(iter(locate('terramind_v1_tiny').values()))
    (tmp_path/core.name).symlink_to(core)
    tim = build_model('terramind_v1_tiny_tim', weights=tmp_path)
    assert tim.encoder_embeddings['untok_sen1grd@224'].proj.weight is tim.sampler.model.encoder_embeddings[
        'untok_sen1grd@224'].proj.weight
    assert encode_features(tim, {'S1GRD': torch.randn(1, 2, 96, 96)}).shape == (1, 36, 192)
    (tmp_path/lulc.file).unlink()
    s1 = torch.randn(3, 2, 120, 120)*4 - 14
    together, alone = generator.generate(s1, timesteps=10), generator.generate(s1[1:2], timesteps=10)
    assert together.shape == (3, 4, 120, 120) and (together[1:2] - alone).abs().max() < 1e-4

def test_every_process_has_its_buffers_in_one_order():
    "DDP pairs the buffers of its processes by their order; that of a set of names is another one in every process."
    inputs, outputs = ('S1GRD', 'S2L2A', 'DEM', 'LULC'), ('LULC', 'NDVI', 'S2L2A')
    model = build_generator(input_modalities=inputs, output_modalities=outputs, pretrained=False)
    keys = dict.fromkeys([*(model.core.mod_name_mapping[m] for m in model.core.modalities), *model.outputs.values()])
    assert [n for n, _ in model.units.named_buffers()] == [f'{k}_{what}' for k in keys for what in ('mean', 'std')]

@pytest.mark.parametrize('name', ['terramind_mini_generate', 'terramind_v1_large_generate'])
def test_what_is_spared_is_the_encoder_of_the_output(name):
    "Counted on TerraTorch's own classes without memory; the tokenizer of an input stays whole."
    core = build_blank(name, memory=False, modalities=['S1GRD', 'LULC'], output_modalities=['S2L2A', 'LULC'])
    kept = {k for k, _ in core.named_parameters()}
    before, read = sum(p.numel() for p in core.parameters()), {core.mod_name_mapping[m] for m in core.modalities}
    spared = spare(core, read)
    gone = kept - {k for k, _ in core.named_parameters()}
    assert spared == before - sum(p.numel() for p in core.parameters()) > .03*before
    (tokenizer,) = {k.split('.')[1] for k in gone}
    assert 'sen2l2a' in tokenizer and {k.split('.')[2] for k in gone} == {'encoder', 'quant_proj'}
    assert name != 'terramind_v1_large_generate' or spared > 90e6

def test_a_generator_of_stage_1_draws_the_same_without_an_encoder_and_says_what_it_cannot_do():
    from gac.evaluation.floors import tokenizer_reconstruction
    from gac.models.decoding import Decoding
    from gac.stages.stage1 import build_terramind_generator
    lean, whole = (build_terramind_generator(tokenizer_encoder=k) for k in (False, True))
    radar = torch.full((1, 2, 48, 48), -15.) + torch.randn(1, 2, 48, 48, generator=torch.Generator().manual_seed(0))
    for tokens in TOKENS: assert torch.equal(lean.generate(radar, 2, tokens), whole.generate(radar, 2, tokens))
    codes = whole.tokenize(torch.full((1, 12, 48, 48), .1))
    assert torch.equal(lean.decode(codes, 48, 1), whole.decode(codes, 48, 1))
    assert weights_checksums(lean.core) == weights_checksums(whole.core)
    assert not any('.encoder.' in k and 'tokenizer' in k for k, _ in lean.named_parameters())
    with pytest.raises(GacError, match='S2L2A cannot be tokenized.*tokenizer_encoder=True'):
        lean.tokenize(torch.zeros(1, 12, 48, 48))
    with pytest.raises(GacError, match='makes no round trip'):
        tokenizer_reconstruction(lean, Decoding(1))(dict(s2=torch.zeros(1, 12, 48, 48).numpy(), id=['a']))

def test_terratorchs_own_loader_refuses_a_tensor_that_was_renamed(tmp_path, monkeypatch):
    "It would start at random with a line in a log; and it reads the folder of --weights."
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
    e = model_entry('terramind_v1_tiny')
    blank = build_blank('terramind_v1_tiny', memory=False, modalities=['S1GRD'])
    state = numbers(blank, 5)
    build = lambda: TERRATORCH_BACKBONE_REGISTRY.build('terramind_v1_tiny', pretrained=True,
                                                       modalities=['S1GRD']).state_dict()
    monkeypatch.setenv('GAC_WEIGHTS', str(tmp_path))
    torch.save(state, tmp_path/e.file)
    for k, v in build().items(): assert torch.equal(v, state[k]), k
    key = next(k for k in state if 'norm1.weight' in k)
    for change in (lambda s: s | {key + '.new': s.pop(key)}, lambda s: s | {key: s[key][:-1]}):
        torch.save(change(dict(state)), tmp_path/e.file)
        with pytest.raises(GacError, match='does not fit TerraMindViT.*' + key): build()
