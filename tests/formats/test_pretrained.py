# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Hugging Face folders, read: what `save_pretrained` has written, in all its forms, and damaged."""

import fnmatch
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from composer_bema.formats.pretrained import (
    copy_companions,
    find_pretrained,
    is_pretrained,
    open_pretrained,
    read_safetensors,
)

FORMS = {
    'safetensors': {},
    'safetensors in shards': {'max_shard_size': '2KB'},
    'bin': {'safe_serialization': False},
    'bin in shards': {'safe_serialization': False, 'max_shard_size': '2KB'},
}


@pytest.fixture
def model(make_causal_lm):
    return make_causal_lm(hidden_size=8, intermediate_size=12)


@pytest.fixture
def shards(model, tmp_path):
    """A model in several files, to be damaged."""
    model.save_pretrained(tmp_path, max_shard_size='2KB')
    return tmp_path


def assert_same(weights, state):
    assert set(weights) == set(state)
    for name, tensor in state.items():
        lazy = weights[name]
        assert (lazy.shape, lazy.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(lazy.read(), tensor)
        for size in (1, 7, 10**6):
            assert torch.equal(torch.cat([piece.clone() for piece in lazy.pieces(size)]), tensor.reshape(-1))


# Weights


@pytest.mark.parametrize('form', FORMS)
def test_models_come_back(model, tmp_path, form):
    model.save_pretrained(tmp_path, **FORMS[form])
    assert is_pretrained(tmp_path)
    opened = open_pretrained(tmp_path)
    assert_same(opened.weights, model.state_dict())
    assert (opened.folder, opened.stem) == (tmp_path, 'model' if 'safetensors' in form else 'pytorch_model')
    assert set(opened.files) == set(tmp_path.glob(f'{opened.stem}*'))
    assert (len(opened.files) > 3) == ('shards' in form)


def test_a_tied_tensor_is_there_once(make_causal_lm, tmp_path):
    model = make_causal_lm(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    del state['lm_head.weight']
    assert_same(open_pretrained(tmp_path).weights, state)


@pytest.mark.parametrize('safe', [True, False])
def test_adapters_come_back(model, tmp_path, safe):
    peft = pytest.importorskip('peft')
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj']))
    adapted.save_pretrained(str(tmp_path), safe_serialization=safe)
    opened = open_pretrained(tmp_path)
    assert_same(opened.weights, peft.get_peft_model_state_dict(adapted))
    assert (opened.stem, [file.suffix for file in opened.files]) == (
        'adapter_model',
        ['.safetensors' if safe else '.bin'],
    )


def test_safetensors_are_preferred(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save({'another': torch.ones(1)}, tmp_path / 'pytorch_model.bin')
    opened = open_pretrained(tmp_path)
    assert (opened.files, opened.stem) == ((tmp_path / 'model.safetensors',), 'model')
    assert_same(opened.weights, model.state_dict())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize('shape', [(), (0,), (0, 2), (5,), (5, 3)])
def test_tensors_of_any_shape_and_dtype(tmp_path, dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    save_file({'a': torch.ones(3, dtype=torch.int8), 'b': tensor, 'c': tensor.clone()}, tmp_path / 'x.safetensors')
    tensors = read_safetensors(tmp_path / 'x.safetensors')
    assert list(tensors)[-1] == 'a' or dtype.itemsize == 1
    for name in ('b', 'c'):
        assert (tensors[name].shape, tensors[name].dtype) == (shape, dtype)
        for values in (
            tensors[name].read().reshape(-1),
            torch.cat([piece.clone() for piece in tensors[name].pieces(4)]),
        ):
            assert torch.equal(values.view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_tensor_read_whole_is_mapped_into_memory_and_no_file_stays_open(shards):
    before = len(os.listdir('/proc/self/fd'))
    opened = open_pretrained(shards)
    tensors = {name: lazy.read() for name, lazy in opened.weights.items()}
    pieces = [lazy.pieces(3) for lazy in opened.weights.values()]
    assert [len(next(some)) for some in pieces] == [3] * len(pieces)
    assert len(os.listdir('/proc/self/fd')) == before
    with open('/proc/self/maps') as file:
        mapped = [line.split()[0].split('-') for line in file if str(shards) in line]
    for tensor in tensors.values():
        assert any(int(begin, 16) <= tensor.data_ptr() < int(end, 16) for begin, end in mapped)


def test_no_more_than_a_piece_is_read_at_a_time(shards, monkeypatch):
    weights = open_pretrained(shards).weights
    reads = []

    class Watched(io.FileIO):
        def readinto(self, buffer):
            reads.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(Path, 'open', lambda path, mode, buffering: Watched(path, mode))
    lazy = weights['model.embed_tokens.weight']
    assert len([piece.clone() for piece in lazy.pieces(5)]) > 50
    assert (max(reads), sum(reads)) == (20, lazy.shape.numel() * 4)


@pytest.mark.parametrize('names', [[], ['config.json'], ['model-00001-of-00002.safetensors'], ['training_args.bin']])
def test_folders_without_weights(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert not is_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"' holds no weights: a Hugging Face folder with one of model\.safe"):
        open_pretrained(tmp_path)
    assert not is_pretrained(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match="There is no folder '.*none': a Hugging Face folder"):
        open_pretrained(tmp_path / 'none')


def test_tensors_that_the_index_leaves_out_are_taken_too(shards):
    """As transformers does; of a tensor in several files it is that of the file which the index says."""
    index = shards / 'model.safetensors.index.json'
    expected = {name: lazy.read().clone() for name, lazy in open_pretrained(shards).weights.items()}
    content = json.loads(index.read_text())
    left_out = 'model.layers.1.mlp.up_proj.weight'
    file = content['weight_map'].pop(left_out)
    index.write_text(json.dumps(content))
    others = sorted(set(content['weight_map'].values()) - {file})
    for other in (others[0], others[-1]):
        tensors = {name: lazy.read().clone() for name, lazy in read_safetensors(shards / other).items()}
        named = next(name for name, place in content['weight_map'].items() if place == file)
        save_file({**tensors, named: torch.zeros(2)}, shards / other)
    assert_same(open_pretrained(shards).weights, expected)


# Damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (Path.unlink, r"' is missing, which '.*index\.json' names; use another checkpoint"),
        (cut, "' cannot be read as weights: .*ncomplete.*; use another checkpoint"),
        (lambda p: p.write_bytes(b''), "' cannot be read as weights"),
        (lambda p: p.write_bytes(b'version https://git-lfs'), "' cannot be read as weights"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b'dtype', b'd"ype')), "' cannot be read as weights"),
        (
            lambda p: save_file({'x': torch.ones(1)}, p),
            r"' lacks the tensor 'model\..*', which '.*index\.json' says is there; use another checkpoint",
        ),
    ],
)
def test_damaged_shards_are_refused(shards, damage, message):
    shard = sorted(shards.glob('*.safetensors'))[1]
    damage(shard)
    with pytest.raises(ValueError, match=str(shard) + message) as caught:
        open_pretrained(shards)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('weight_map', 'message'),
    [
        (None, 'is damaged: it does not say which file each tensor is in'),
        (['x'], 'is damaged: it does not say which file each tensor is in'),
        ({'x': 1}, 'is damaged: it does not say which file each tensor is in'),
        ({}, 'cannot be read as weights: it holds no tensors'),
        ({'x': '../x'}, r"names the file '\.\./x', which is not in its folder"),
        ({'x': '/etc/passwd'}, "names the file '/etc/passwd', which is not in its folder"),
        ({'x': '..'}, "names the file '..', which is not in its folder"),
    ],
)
def test_damaged_indexes_are_refused(tmp_path, weight_map, message):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json' {message}"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize('content', [b'', b'{"weight_map": {"a', b'[]', b'{}', b'\xff\xfe'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / 'pytorch_model.bin.index.json').write_bytes(content)
    with pytest.raises(ValueError, match=r"bin\.index\.json' is damaged: it does not say which file each tensor is in"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (cut, 'its end is missing, or it is another kind of file'),
        (lambda p: torch.save({'a': torch.ones(1)}, p, _use_new_zipfile_serialization=False), 'another kind of file'),
        (lambda p: torch.save([torch.ones(1)], p), 'it holds no tensors'),
        (lambda p: torch.save({'a': 1, 2: torch.ones(1)}, p), 'it holds no tensors'),
    ],
)
def test_damaged_archives_are_refused(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path, safe_serialization=False)
    damage(tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin' cannot be read as weights: .*{message}"):
        open_pretrained(tmp_path)


def test_a_file_that_has_changed_since_it_was_opened(tmp_path):
    file = tmp_path / 'x.safetensors'
    save_file({'x': torch.ones(100)}, file)
    lazy = read_safetensors(file)['x']
    pieces = lazy.pieces(40)
    next(pieces)
    cut(file)
    with pytest.raises(ValueError, match=r"x\.safetensors' cannot be read as weights: its end is missing"):
        list(pieces)
    with pytest.raises(ValueError, match=r"x\.safetensors' cannot be read as weights: .*ncomplete"):
        lazy.read()
    save_file({'y': torch.ones(100)}, file)
    with pytest.raises(ValueError, match='cannot be read as weights: File does not contain tensor x; use'):
        lazy.read()
    file.unlink()
    for read in (lazy.read, lambda: next(lazy.pieces(1)), lambda: read_safetensors(file)):
        with pytest.raises(FileNotFoundError, match=r'x\.safetensors'):
            read()


def test_an_unknown_dtype_is_refused(tmp_path):
    header = json.dumps({'x': {'dtype': 'F8_E8M0', 'shape': [2], 'data_offsets': [0, 2]}}).encode()
    file = tmp_path / 'x.safetensors'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + b'ab')
    # Of that name the library of old knows nothing.
    with pytest.raises(ValueError, match=r"x\.safetensors' cannot be read as weights: .*(F8_E8M0.*'x'|Invalid)"):
        read_safetensors(file)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path):
    torch.save({'a': torch.ones(3), 'b': Evil(tmp_path / 'made')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' cannot be read as weights: it cannot be unpickled"):
        open_pretrained(tmp_path)
    assert not (tmp_path / 'made').exists()


# What belongs to the model

OF_THE_MODEL = [
    'adapter_config.json',
    'added_tokens.json',
    'additional_chat_templates/tools.jinja',
    'chat_template.jinja',
    'chat_template.json',
    'config.json',
    'configuration_own.py',
    'generation_config.json',
    'merges.txt',
    'modules/attention/kernel.py',
    'preprocessor_config.json',
    'qwen.tiktoken',
    'special_tokens_map.json',
    'spiece.model',
    'tokenizer.json',
    'tokenizer.model',
    'tokenizer_config.json',
    'vocab.json',
    'vocab.txt',
]
OF_THE_RUN = [
    '.cache/huggingface/config.json',
    '.git/hooks/x.py',
    'README.md',
    'adapter_model.bin',
    'adapter_model.safetensors',
    'all_results.json',
    'averaging.json',
    'checkpoint-5/config.json',
    'checkpoint-5/configuration_own.py',
    'eval_results.json',
    'global_step5/mp_rank_00_model_states.pt',
    'latest',
    'model-00001-of-00002.safetensors',
    'model.safetensors.index.json',
    'onnx/config.json',
    'optimizer.pt',
    'original/tokenizer.model',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'rng_state_0.pth',
    'runs/May01/events.out.tfevents.1',
    'scaler.pt',
    'scheduler.pt',
    'trainer_state.json',
    'training_args.bin',
    'wandb/run-1/code.py',
    'zero_to_fp32.py',
]


def make_files(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_companions_are_copied_and_the_state_of_the_run_is_not(tmp_path):
    make_files(tmp_path / 'a', [*OF_THE_MODEL, *OF_THE_RUN])
    make_files(tmp_path / 'b', ['config.json', 'other.json'])
    (tmp_path / 'b' / 'config.json').write_text('old')
    copy_companions(tmp_path / 'a', tmp_path / 'b')
    assert files_in(tmp_path / 'b') == sorted([*OF_THE_MODEL, 'other.json'])
    assert all((tmp_path / 'b' / name).read_text() == name for name in OF_THE_MODEL)


def test_links_are_copied_as_files(tmp_path):
    """As in the cache of the hub, where the files that they lead to may not be written to."""
    make_files(tmp_path / 'blobs', ['1', '2'])
    snapshot = tmp_path / 'snapshots' / 'main'
    (snapshot / 'code').mkdir(parents=True)
    for blob, name in (('1', 'config.json'), ('2', 'code/model.py')):
        (tmp_path / 'blobs' / blob).chmod(0o444)
        (snapshot / name).symlink_to(os.path.relpath(tmp_path / 'blobs' / blob, (snapshot / name).parent))
    (snapshot / 'circle').symlink_to(snapshot)
    (tmp_path / 'copy').mkdir()
    copy_companions(snapshot, tmp_path / 'copy')
    assert files_in(tmp_path / 'copy') == ['code/model.py', 'config.json']
    for name, content in (('config.json', '1'), ('code/model.py', '2')):
        copy = tmp_path / 'copy' / name
        assert not copy.is_symlink()
        assert (copy.read_text(), copy.stat().st_mode & 0o200) == (content, 0o200)


def test_a_model_with_its_companions_can_be_loaded(model, tmp_path):
    import transformers

    model.save_pretrained(tmp_path / 'a')
    (tmp_path / 'b').mkdir()
    copy_companions(tmp_path / 'a', tmp_path / 'b')
    assert not is_pretrained(tmp_path / 'b')
    weights = open_pretrained(tmp_path / 'a').weights
    save_file({name: lazy.read() for name, lazy in weights.items()}, tmp_path / 'b/model.safetensors', {'format': 'pt'})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one model, `some/model`; files that are asked for appear in a cache."""
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'cache').mkdir()

    def snapshot_download(name, allow_patterns):
        assert name == 'some/model'
        for file in files_in(tmp_path / 'hub'):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / 'cache' / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(tmp_path / 'hub' / file, tmp_path / 'cache' / file)
        return str(tmp_path / 'cache')

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    return tmp_path / 'hub'


def test_a_folder_is_taken_as_it_is(hub, tmp_path):
    assert find_pretrained(str(tmp_path)) == tmp_path


@pytest.mark.parametrize('form', FORMS)
def test_models_are_downloaded_with_one_set_of_weights(hub, model, form):
    model.save_pretrained(hub, **FORMS[form])
    weights = {path.name for path in hub.glob('*model*')}
    make_files(hub, ['README.md', 'tokenizer.json', 'flax_model.msgpack', 'original/consolidated.00.pth'])
    make_files(hub, ['model.fp16.safetensors', 'consolidated.safetensors', 'onnx/model.safetensors'])
    if 'safetensors' in form:
        model.save_pretrained(hub, safe_serialization=False)
    folder = find_pretrained('some/model')
    assert set(files_in(folder)) == {*weights, 'config.json', 'generation_config.json', 'tokenizer.json'}
    assert_same(open_pretrained(folder).weights, model.state_dict())


def test_adapters_are_downloaded(hub):
    save_file({'x': torch.ones(1)}, hub / 'adapter_model.safetensors')
    make_files(hub, ['adapter_config.json', 'adapter_model.bin', 'optimizer.pt'])
    assert files_in(find_pretrained('some/model')) == ['adapter_config.json', 'adapter_model.safetensors']


@pytest.mark.parametrize('error', [LocalEntryNotFoundError('Nothing.\nAdvice.'), ValueError('a b'), OSError('timeout')])
def test_what_cannot_be_downloaded_is_one_sentence(monkeypatch, error):
    def snapshot_download(name, **kwargs):
        raise error

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    with pytest.raises(
        FileNotFoundError, match=r"'some/model' is neither a folder nor a model that could be down"
    ) as e:
        find_pretrained('some/model')
    assert str(e.value).count('.') == 1


@pytest.mark.parametrize('name', ['no-such-folder', '../no/such/folder', '/no/such', 'some/model'])
def test_names_that_the_hub_itself_refuses(name):
    """It is offline in tests."""
    with pytest.raises(FileNotFoundError, match=f"'{name}' is neither a folder nor a model that could be downloaded"):
        find_pretrained(name)
