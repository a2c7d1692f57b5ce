"A report is judged in digits and in conclusions: noise breaks the first, a turned sign or a lost column the second."
import shutil

import numpy as np
import pandas as pd
import pytest

from gac.core.files import read_yaml, root
from gac.runner.conclusions import MISSING, interval_columns, verdict_columns
from gac.runner.verify import count_levels, describe_processor, judge_reports

TOLERANCES = read_yaml(root()/'nbs'/'params'/'tolerances.yaml')
MINI = root()/'reports'/'mini'

@pytest.fixture
def judge(tmp_path):
    "Change tables of a copy of the committed report and judge it: name -> function of the table."
    def made(**changes):
        for name, change in changes.items():
            path = tmp_path/'tables'/f'{name}.csv'
            table = change(pd.read_csv(path, dtype=str, keep_default_na=False))
            path.unlink() if table is None else table.to_csv(path, index=False)
        return judge_reports(MINI, tmp_path, TOLERANCES, True)
    shutil.copytree(MINI/'tables', tmp_path/'tables')
    return made

def moved(share:float):
    "Return a change that moves every value and its interval by a share of the interval's length."
    def change(table):
        table = table.copy()
        for names in interval_columns(table):
            values = table[list(names)].apply(pd.to_numeric, errors='coerce')
            shift = share*(values[names[2]] - values[names[1]])
            for c in names:
                table[c] = [old if old in MISSING else f'{v:.6f}' for old, v in zip(table[c], values[c] + shift)]
        return table
    return change

def test_a_report_holds_against_itself(judge):
    found = judge()
    assert len(found) > 50
    assert all(v.same_bytes and v.holds('digits') and v.holds('conclusions') for v in found.values())
    judged, n = {k for k, v in found.items() if 'digits' in v.judged}, len(found)
    d = len(judged)
    assert count_levels(found) == (f'Digits hold for {d} of {d} tables, {d} of them byte for byte; '
                                   f'conclusions for {n} of {n}.')
    assert 'claims' in found and 'claims' not in judged and 'efficiency' not in found

def test_noise_within_the_intervals_breaks_digits_alone(judge):
    held = judge(results=moved(.3))['results']
    assert len(held.digits) > 50 and not held.conclusions and not held.same_bytes

def test_noise_beyond_the_intervals_breaks_conclusions(judge):
    found = judge(results=moved(1.5))['results']
    assert any(l.startswith('Stage 1, ') and ', psnr: published' in l and l.endswith('disjoint')
               for l in found.conclusions)

def test_a_turned_sign_is_named_with_its_row(judge):
    def turn(table):
        turned = -table[['gain', 'hi', 'lo']].apply(pd.to_numeric, errors='coerce')
        rows = (table.step == '1→2') & (table.metric == 'psnr')
        return table.assign(**{c: np.where(rows, turned[other].astype(str), table[c])
                               for c, other in (('gain', 'gain'), ('lo', 'hi'), ('hi', 'lo'))})
    lines = judge(stage_gains=turn)['stage_gains'].conclusions
    assert len(lines) == 1 and lines[0].startswith('1→2, psnr, gain: published ') and lines[0].endswith('opposite sign')

def test_an_interval_that_holds_zero_concludes_nothing_about_the_sign(judge):
    "An open gain may turn its sign, a decided one may become open: the intervals overlap."
    row = lambda gain, lo, hi: lambda t: t.assign(gain=np.where(t.metric == 'psnr', gain, t.gain),
                                                  lo=np.where(t.metric == 'psnr', lo, t.lo),
                                                  hi=np.where(t.metric == 'psnr', hi, t.hi))
    published = pd.read_csv(MINI/'tables'/'stage_gains.csv').query("metric == 'psnr' and step == '1→2'").iloc[0]
    assert published.lo > 0
    only = lambda change: lambda t: pd.concat([change(t[t.step == '1→2']), t[t.step != '1→2']]).sort_index()
    opened = judge(stage_gains=only(row('0.05', '-0.3', '0.4')))['stage_gains']
    assert not opened.conclusions and opened.digits
    turned = judge(stage_gains=only(row('-0.05', '-0.3', '0.4')))['stage_gains']
    assert len(turned.conclusions) == 1 and 'opposite sign' in turned.conclusions[0]

def test_methods_in_another_order_are_named(judge):
    def swap(table):
        table = table.copy()
        names = [c for c in table if c.startswith('psnr')]
        i, j = (table.index[(table.method == m) & (table.data == 'world')][0] for m in ('band mean', 'Stage 1+2+3'))
        table.loc[[i, j], names] = table.loc[[j, i], names].to_numpy()
        return table
    assert any(l.startswith('Stage 1+2+3 over band mean, psnr:') or 'Stage 1+2+3' in l and 'over band mean' in l
               for l in judge(results=swap)['results'].conclusions)

def test_a_lost_table_column_or_row_breaks_conclusions_and_a_new_one_does_not(judge):
    assert judge(results=lambda t: None)['results'].conclusions == ('missing in the fresh run',)
    assert judge(averaged=lambda t: t.drop(columns='psnr_hi'))['averaged'].conclusions == ('column psnr_hi is missing',)
    assert judge(stage2=lambda t: t[1:])['stage2'].conclusions == ("row 'opt_v1' is missing",)
    new = judge(stage3=lambda t: t.assign(more='1'))['stage3']
    assert new.digits and not new.conclusions

def test_verdicts_count_where_both_are_decided(judge):
    other = lambda old, new: lambda t: t.assign(verdict=[new if v == old else v for v in t.verdict])
    lines = judge(nyc_gate=other('negative', 'strong'))['nyc_gate'].conclusions
    assert lines and all("published 'negative', repeated 'strong'" in line for line in lines)
    assert not judge(nyc_gate=other('strong', 'open'))['nyc_gate'].conclusions

def test_intervals_and_verdicts_of_committed_tables_are_found_by_their_names():
    "A bound belongs to a column, in every committed table; a column with both words yes and no is a verdict."
    for path in [*(root()/'reports').glob('*/tables/*.csv'), *(root()/'reports'/'real').glob('*/tables/*.csv')]:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        used = {c for names in interval_columns(table) for c in names}
        bounds = {c for c in table if c in ('lo', 'hi') or c.endswith(('_lo', '_hi'))}
        assert bounds <= used, f'{path}: {bounds - used} belong to no column'
        assert 'verdict' not in table or 'verdict' in verdict_columns(table)

def test_a_report_without_processor_says_so():
    assert describe_processor(root()/'nowhere') == 'processor not recorded; no pins recorded'
