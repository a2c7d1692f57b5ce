"Fetching the public chips: from a server of our own, with a wrong file and with a connection that breaks."
import hashlib
import http.server
import io
import tarfile
import threading

import pandas as pd
import pytest
import yaml

from gac.core.environment import sha256
from gac.core.files import GacError, root
from gac.data.examples import fetch_examples

sha = lambda content: hashlib.sha256(content).hexdigest()

class Handler(http.server.BaseHTTPRequestHandler):
    "Serves a dictionary of files; some of them break off half-way, once or always."
    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None: return self.send_error(404)
        cut = self.server.cuts.get(self.path, 0) > 0
        if cut: self.server.cuts[self.path] -= 1
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content)//2] if cut else content)
    def log_message(self, *args): pass

@pytest.fixture
def server():
    "Start a web server on this machine and stop it after the test."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files, server.cuts, server.asked = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()

@pytest.fixture
def registry(server):
    "Three small data sets of the three kinds: files, archives, rows of official tables."
    a, b, chip, other = b'tile a'*999, b'tile b'*999, b'chip'*500, b'not asked for'
    tables = []
    for ids in (['p1', 'p2'], ['p3']):
        buffer = io.BytesIO()
        pd.DataFrame({'patch_id': ids, 'country': 'Ireland'}).to_parquet(buffer)
        tables.append(buffer.getvalue())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:bz2') as tar:
        for name, content in (('deep/folder/v1_B02.tif', chip), ('deep/other.tif', other)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    server.files = {'/o/tiles/1/ex/a.tif': a, '/o/tiles/1/ex/b.tif': b, '/o/ben/2/x.tar.bz2': archive.getvalue(),
                    '/o/meta/3/m.parquet': tables[0], '/o/meta/3/snow.parquet': tables[1]}
    make = lambda name, commit, **kw: dict(repository=f'o/{name}', commit=commit, licence='test', **kw)
    return {'tiles': make('tiles', 1, files={'S1/a.tif': ['ex/a.tif', sha(a)], 'S2/b.tif': ['ex/b.tif', sha(b)]}),
            'bigearthnet_v2_official_metadata': make('meta', 3,
                                                     files={'m.parquet': ['m.parquet', sha(tables[0])],
                                                            'snow.parquet': ['snow.parquet', sha(tables[1])]}),
            'ben': make('ben', 2, archives=['x.tar.bz2'], members={'S2/p1/p1_B02.tif': ['v1_B02.tif', sha(chip)]},
                        rows=['p3', 'p1'])}

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def test_fetches_once(server, registry, tmp_path):
    fetch_examples(tmp_path, server.url, registry=registry)
    whole = ['ben/S2/p1/p1_B02.tif', 'ben/metadata.parquet', 'bigearthnet_v2_official_metadata/m.parquet',
             'bigearthnet_v2_official_metadata/snow.parquet', 'tiles/S1/a.tif', 'tiles/S2/b.tif']
    assert files(tmp_path) == whole
    assert (tmp_path/'ben/S2/p1/p1_B02.tif').read_bytes() == b'chip'*500
    assert pd.read_parquet(tmp_path/'ben/metadata.parquet').patch_id.tolist() == ['p3', 'p1']
    asked = len(server.asked)
    fetch_examples(tmp_path, server.url, registry=registry)
    assert len(server.asked) == asked, 'what is there and whole is not fetched again'
    (tmp_path/'tiles/S1/a.tif').write_bytes(b'damaged')
    fetch_examples(tmp_path, server.url, only=['tiles'], registry=registry)
    assert server.asked[asked:] == ['/o/tiles/1/ex/a.tif'] and files(tmp_path) == whole

def test_wrong_checksum(server, registry, tmp_path):
    server.files['/o/tiles/1/ex/b.tif'] = b'something else'
    with pytest.raises(GacError, match='ex/b.tif: the file has another checksum'):
        fetch_examples(tmp_path, server.url, registry=registry)
    assert files(tmp_path) == ['tiles/S1/a.tif'], 'the wrong file leaves nothing'

def test_wrong_checksum_inside_an_archive(server, registry, tmp_path):
    registry['ben']['members']['S2/p1/p1_B02.tif'][1] = '0'*64
    with pytest.raises(GacError, match='v1_B02.tif has another checksum'):
        fetch_examples(tmp_path, server.url, only=['ben'], registry=registry)
    assert files(tmp_path) == []

def test_member_missing_from_the_archive(server, registry, tmp_path):
    registry['ben']['members']['S2/p1/p1_B03.tif'] = ['v1_B03.tif', '0'*64]
    with pytest.raises(GacError, match='p1_B03.tif and 0 more were not inside'):
        fetch_examples(tmp_path, server.url, only=['ben'], registry=registry)

def test_cut_connection_is_tried_again(server, registry, tmp_path):
    server.cuts = {'/o/tiles/1/ex/a.tif': 1, '/o/ben/2/x.tar.bz2': 1}
    fetch_examples(tmp_path, server.url, registry=registry)
    assert (tmp_path/'tiles/S1/a.tif').read_bytes() == b'tile a'*999 and (tmp_path/'ben/S2/p1/p1_B02.tif').exists()

def test_connection_that_stays_cut(server, registry, tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    server.cuts = {'/o/tiles/1/ex/b.tif': 99}
    with pytest.raises(GacError, match='ex/b.tif: could not be fetched.*run the command again'):
        fetch_examples(tmp_path, server.url, registry=registry)
    assert files(tmp_path) == ['tiles/S1/a.tif'], 'what arrived stays, what broke leaves nothing'
    server.cuts, server.asked[:] = {}, []
    fetch_examples(tmp_path, server.url, only=['tiles'], registry=registry)
    assert server.asked == ['/o/tiles/1/ex/b.tif'], 'only what is missing is fetched'

def test_no_such_file_on_the_server(server, registry, tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    del server.files['/o/tiles/1/ex/a.tif']
    with pytest.raises(GacError, match='ex/a.tif: could not be fetched'):
        fetch_examples(tmp_path, server.url, only=['tiles'], registry=registry)

def test_no_network(registry, tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    with pytest.raises(GacError, match='Is there a network'):
        fetch_examples(tmp_path, 'http://127.0.0.1:9', only=['tiles'], registry=registry)

def test_the_committed_registry_describes_the_real_chips(real_data):
    "Every file that would be fetched is the file the study has been tested on."
    registry = yaml.safe_load((root()/'nbs/params/examples.yaml').read_text())
    for name, source in registry.items():
        listed = {to: digest for to, (_, digest) in source.get('files', source.get('members')).items()}
        for to, digest in listed.items(): assert sha256(real_data/name/to) == digest, to
    rows = pd.read_parquet(real_data/'bigearthnet_v2/metadata.parquet')
    assert rows.patch_id.tolist() == registry['bigearthnet_v2']['rows']
