"Verdicts follow the tables: another table, another verdict; no table, no verdict; every claim has its row."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from swapping import swap

from gac.core.files import root
from gac.evaluation.claim_list import CLAIMS
from gac.evaluation.claims import Claim, Tables, class_of, judge_claim, judged_part
from gac.evaluation.claims_report import (
    EDGES,
    KNOWN_BY,
    claim_ratios,
    claims_figure,
    claims_page,
    claims_table,
    found_ablations,
    study_findings,
)


def named(start:str) -> Claim:
    "Return the claim that begins with these words."
    return next(c for c in CLAIMS if c.claim.startswith(start))

@pytest.fixture
def report(tmp_path):
    "Write the tables of a report: name -> columns."
    def write(**tables) -> Tables:
        for name, columns in tables.items(): pd.DataFrame(columns).to_csv(tmp_path/f'{name}.csv', index=False)
        return Tables(tmp_path)
    return write

def stages(psnr:float, spread:float=1.) -> dict:
    "Rows of results.csv with one PSNR for all stages."
    methods = ['Stage 1', 'Stage 1+2', 'Stage 1+2+3']
    return dict(data='world', method=methods, psnr=psnr, psnr_lo=psnr - spread, psnr_hi=psnr + spread, ssim=.8,
                sar_edge=.17, sam_deg=4., mse=.002, mae=.03)

def test_another_table_gives_another_verdict(report):
    target = replace(named('Target: PSNR'), needs=())
    judged = lambda psnr: judge_claim(target, report(results=stages(psnr)))
    assert judged(31.)['verdict'] == 'holds' and judged(31.)['measured'] == 31. and judged(31.)['lo'] == 30.
    assert judged(29.5)['verdict'] == 'fails, though its interval reaches the claim'
    assert judged(24.)['verdict'] == 'fails'

def test_every_claim_has_one_row_even_where_there_is_no_table(tmp_path, monkeypatch):
    swap(monkeypatch, 'gac.evaluation.claims', 'GPU_REPORT', tmp_path/'none')
    table = claims_table(Tables(tmp_path/'nothing'))
    assert table.claim.tolist() == [c.claim for c in CLAIMS] and table.claim.is_unique
    assert list(table.columns) == ['about', 'claim', 'claimed', 'measured', 'lo', 'hi', 'unit', 'verdict', 'how']
    assert table.measured.isna().all() and set(table.verdict.map(class_of)) == {'cannot be tested here', 'not measured'}
    for c, verdict in zip(CLAIMS, table.verdict):
        if c.reads:
            assert f'not measured: {c.reads[0][1][next(iter(c.reads[0][1]))][0]}.csv' in verdict, ('the missing table '
                                                                                                   'is named')
    assert claims_page(table).count('\n| ') == len(table) + table.about.nunique()
    claims_figure(table)  # nothing to show is no error

def test_numbers_of_the_documents_are_all_there():
    said = {c.said for c in CLAIMS}
    assert said >= {'+0.06–0.07', '10–50', '5–20', '1B+', '> 50', '~1', '≤ 1', '≥ 0',
                    '25–28', '0.75–0.82', '0.15–0.20', '28–32', '0.82–0.88', '0.18–0.25', '+3–4', '30–34', '0.85–0.90',
                    '0.12–0.16', '+5–6', '25', '5–15', '5–10', '≥ 30', '≥ 0.85', '≤ 0.15', '≤ 5', '< 5', '~0.5', '~1.0',
                    '~2.0', '~28', '40–50', '200–250', '~1.4', '3', '~3.8', '6', '1–8', '< 2', '196', '768', '2–5',
                    '~0.2', '~500', '~200', '2–3', '~4', '1.01', '75', '3–4', '25–30', '~6', '72.25', '68.00', '42.74',
                    '41.87', '0.5253', '0.5380', '0.5866', '0.6023', '0.3553', '0.074', '0.116', '0.750', '26.21'}

def test_a_hole_in_a_table_is_named_and_stops_nothing(report):
    target = replace(named('Target: PSNR'), needs=())
    without = {k: v for k, v in stages(31.).items() if k != 'psnr'}
    assert judge_claim(target, report(results=without))['verdict'].startswith('not measured: psnr where')
    assert judge_claim(target, report(results=stages(31.) | dict(data='real: chips')))['verdict'].startswith(
        'not measured: psnr where')
    assert (judge_claim(target, report(results=stages(31.) | dict(psnr='n/a')))['verdict'] == 'not measured: psnr in '
                                                                                              'results.csv, which '
                                                                                              'reads n/a')
    assert judge_claim(target, report(results=dict(other=[1])))['verdict'].startswith('not measured: results.csv, '
                                                                                      'which has other columns')

def test_the_miniature_is_no_test_until_the_inputs_are_there(report):
    target = named('Target: PSNR')
    tables = report(results=stages(31.))
    verdict = judge_claim(target, tables)['verdict']
    assert (verdict.startswith('cannot be tested here: needs the pretrained weights and BigEarthNet v2')
            and verdict.endswith('the miniature holds'))
    assert judge_claim(target, tables,
                       have=('weights',))['verdict'].startswith('cannot be tested here: needs BigEarthNet v2')
    real = report(results=stages(31.) | dict(data='real: bigearthnet'))
    table = claims_table(real, (target,), have=('weights', 'bigearthnet'))
    assert table.verdict[0] == 'holds' and 'real: bigearthnet' in table.how[0]

def test_a_claim_that_holds_in_one_reading_says_which(report):
    saves = named('8 bits save')
    sizes = lambda generator: report(models=dict(model=['terramind_v1_large_generate', 'prithvi_eo_v2_600_tl'],
                                                 int8_mb=[generator, 25.], float32_mb=[100., 100.]))
    judged = judge_claim(saves, sizes(40.))
    assert (judged['verdict'].startswith('holds only if nearly all weights') and judged['measured'] == pytest.approx(75)
            and 'otherwise 60 %' in judged['how'])
    assert judge_claim(saves, sizes(25.))['verdict'] == 'holds'

def test_a_mark_that_the_truth_misses_is_not_attainable(report):
    "SAR-edge of the truth decides whether a mark can be met, with or without the real weights."
    target, goal = named('Target: SAR-edge'), named('Target: SSIM')
    truth = lambda v: dict(data='world', method=['Stage 1+2+3'], sar_edge_truth=[v])
    assert judge_claim(target, report(results=stages(30.), ranking=truth(.445)))['verdict'] == (
        'not attainable: the truth has 0.445')
    assert class_of(judge_claim(target, report(results=stages(30.), ranking=truth(.1)))['verdict']) == (
        'cannot be tested here')
    assert judge_claim(replace(target, needs=()), report(results=stages(30.), ranking=truth(.1)))['verdict'] == 'fails'
    trip = pd.DataFrame(stages(30.)).query("method == 'Stage 1+2+3'").assign(method='tokenizer round trip', ssim=.82)
    rows = pd.concat([pd.DataFrame(stages(30.)), trip])
    verdict = judge_claim(goal, report(results=rows))['verdict']
    assert judged_part(verdict) == "above the tokenizer's round trip of 0.82" and verdict.startswith('cannot')
    assert judge_claim(replace(goal, needs=()), report(results=rows.assign(ssim=.9)))['verdict'] == 'holds'

def test_a_gain_whose_interval_holds_zero_is_open(report):
    more = replace(named('More diffusion steps'), needs=())
    row = lambda gain, lo, hi: dict(question=['diffusion steps'], row=['10'], metric=['psnr'], gain=[gain], lo=[lo],
                                    hi=[hi])
    verdict = lambda *gain: judge_claim(more, report(ablations=row(*gain)))['verdict']
    assert verdict(.04, -.005, .083) == verdict(-.01, -.05, .03) == 'open: the interval holds zero'
    assert (verdict(.04, .005, .083), verdict(-.04, -.083, -.005)) == ('holds', 'fails')

def test_every_metric_that_a_stage_worsens_is_counted(report):
    gains = dict(data='world', step=['1→2', '1→2', '2→3'], metric=['psnr', 'ssim', 'psnr'], gain=[.3, -.02, -.01],
                 lo=[.2, -.03, -.03], hi=[.4, -.01, .01])
    judged = judge_claim(replace(named('Metrics improve'), needs=()), report(stage_gains=gains))
    assert (judged['measured'], judged['verdict']) == (1, 'fails')
    gains['gain'][1], gains['lo'][1], gains['hi'][1] = .02, .01, .03
    assert judge_claim(replace(named('Metrics improve'), needs=()), report(stage_gains=gains))['verdict'] == 'holds'

def test_a_ratio_is_measured_over_claimed_and_one_sided_claims_are_open(report):
    claims = named('Target: PSNR'), named('Target: SAR-edge'), named('Prithvi 600M in 8 bits'), named('More diffusion')
    tables = report(results=stages(31.), models=dict(model=['prithvi_eo_v2_600_tl'], int8_mb=[637.]))
    ratios = claim_ratios(claims_table(tables, claims), claims)
    assert ratios.ratio.tolist() == pytest.approx([31/30, .17/.15, 637/(200*250)**.5])
    assert ratios[['low', 'high']].to_numpy().tolist() == [[1, EDGES[1]], [EDGES[0], 1],
                                                           pytest.approx([(200/250)**.5, (250/200)**.5])]
    assert claims_figure(claims_table(tables, claims), claims).axes[0].get_xscale() == 'log'

def test_interval_of_a_share_is_carried_along(report):
    less = named('Stage 3 lowers the SAR-edge')
    tables = report(results=stages(30.),
                    stage_gains=dict(data=['world'], step=['2→3'], metric=['sar_edge'], gain=[.034], lo=[.017],
                                     hi=[.051]))
    judged = judge_claim(less, tables)
    assert [judged[k] for k in ('measured', 'lo', 'hi')] == pytest.approx([20, 10, 30])

def test_the_second_source_counts_where_the_first_is_missing(report):
    more = named('More diffusion steps')
    grid = dict(timesteps=[1, 10], tokens='expected', clamp='pretraining', n_samples=1, psnr=[26., 26.5])
    assert judge_claim(more, report(stage1_decodings=grid))['measured'] == pytest.approx(.5)
    row = dict(question=['diffusion steps'], row=['10'], metric=['psnr'], gain=[-.1], lo=[-.2], hi=[0.])
    assert judge_claim(more, report(ablations=row))['measured'] == pytest.approx(-.1)

def test_findings_read_their_numbers(report):
    gains = dict(data='world', step='1→2', metric=['psnr', 'sar_edge_gap'], gain=[.5, -.01], lo=[.3, -.02],
                 hi=[.7, .01])
    tables = report(results=stages(27.25), stage_gains=gains)
    said = ' '.join(study_findings(claims_table(tables), tables))
    assert ('27.25' in said and '+0.50 [+0.30, +0.70] dB (for certain)' in said
            and '-0.010 [-0.020, +0.010] (not told apart from nothing)' in said)
    assert f'Of {len(CLAIMS)} claims' in said and 'Pretraining' not in said  # knowledge_gains.csv is not there

def test_what_the_foundation_models_bring_is_said_win_or_lose(report):
    known = dict(zip(('question', 'row'), zip(*KNOWN_BY)))
    rows = {k: [*v, 'clamp'] for k, v in known.items()} | dict(metric='psnr', gain=-.02, lo=-.06, hi=.03)
    said = found_ablations(report(ablations=rows), 'world')
    assert f'Of {len(KNOWN_BY) + 1} ablations none is told apart' in said
    rows |= dict(lo=[*[-.06]*len(KNOWN_BY), -.03], hi=[*[.03]*len(KNOWN_BY), -.01])
    said = found_ablations(report(ablations=rows), 'world').split('each taken away: ')[1]
    assert all(f'{q}: {r} -0.02' in said for q, r in KNOWN_BY) and 'clamp' not in said

def test_committed_report_answers_what_needs_no_inputs():
    folder = root()/'reports'/'mini'/'tables'
    tables = Tables(folder, claims_facts=pd.DataFrame(dict(fact=[], value=[])))
    free = [c for c in CLAIMS if not c.needs and 'claims_facts' not in str(c.reads)]
    table = claims_table(tables, free)
    assert len(free) > 5 and np.isfinite(table.measured).sum() > 5
    for c, verdict in zip(free, table.verdict):
        name = next(iter(c.reads[0][1].values()))[0]
        if verdict.startswith('not measured'):  # no such table, or no such row
            assert not (folder/f'{name}.csv').exists() or f', in {name}.csv' in verdict, f'{c.claim}: {verdict}'

def test_a_cost_measured_on_a_card_asks_for_no_weights(tmp_path, monkeypatch):
    "Costs come from gac bench if it has run; else the miniature is measured and the claim stays untested."
    claim = next(c for c in CLAIMS if c.claim == 'Stage 1 of 199,762 tiles takes')
    mini = pd.DataFrame([dict(method='this project', steps=10, ms_per_tile=100.)])
    swap(monkeypatch, 'gac.evaluation.claims', 'GPU_REPORT', tmp_path/'none')
    row = judge_claim(claim, Tables(tmp_path, efficiency=mini))
    assert row['verdict'].startswith('cannot be tested here') and row['measured'] == pytest.approx(.1*199762/3600)
    (tmp_path/'gpu/tables').mkdir(parents=True)
    rows = [('TerraTorch, one tile at a time', 700.)]
    pd.DataFrame([dict(method=m, steps=10, precision='32-true', ms_per_tile=t) for m, t in rows]).to_csv(
        tmp_path/'gpu/tables/efficiency.csv')
    pd.DataFrame([dict(stage='Stage 1, 10 steps', tiles_per_s=100.)]).to_csv(tmp_path/'gpu/tables/efficiency_chain.csv')
    (tmp_path/'gpu/provenance.json').write_text('{"device": "a card"}')
    swap(monkeypatch, 'gac.evaluation.claims', 'GPU_REPORT', tmp_path/'gpu')
    row = judge_claim(claim, Tables(tmp_path, efficiency=mini))
    assert row['verdict'] == 'holds, measured on a card, float16, compiled'
    assert row['measured'] == pytest.approx(.01*199762/3600)
    assert 'efficiency_chain.csv of gac bench on a card' in row['how']
