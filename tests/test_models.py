import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ppdensecl.losses import info_nce_plain
from ppdensecl.models import DenseCL, DenseProjectionHead, NegativeQueue, ResNet, densecl, matching
from ppdensecl.models.densecl import normalise


def small(**options):
    paddle.seed(0)
    return DenseCL(**{**dict(backbone="resnet18", hidden_dim=32, embedding_dim=16, queue_len=64), **options})


def views(n=2, size=(64, 64), seed=0):
    rng = np.random.default_rng(seed)
    return [paddle.to_tensor(rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)) for _ in range(2)]


# --- backbone ---

@pytest.mark.parametrize("depth, entries, width", [(18, 120, 512), (34, 216, 512), (50, 318, 2048), (101, 624, 2048)])
def test_resnet_has_torchvisions_names(depth, entries, width):
    net = ResNet(depth)
    names = set(net.state_dict())
    # torchvision: weight, bias, running_mean, running_var and num_batches_tracked a BatchNorm; we have four of the five
    norms = sum(name.endswith("._mean") for name in names)
    assert len(names) + norms == entries and net.feat_channels[-1] == width
    assert {"conv1.weight", "bn1._mean", "layer2.0.downsample.0.weight", "layer4.1.bn2._variance"} <= names
    assert ("layer1.0.downsample.0.weight" in names) == (depth >= 50)


def test_a_cut_backbone_has_the_first_stages_only():
    whole, cut = ResNet(18), ResNet(18, stages=2)
    cut.set_state_dict({name: value for name, value in whole.state_dict().items()})
    assert cut.feat_channels == [64, 128] and not hasattr(cut, "layer3")
    x = paddle.randn([2, 3, 64, 64])
    whole.eval(), cut.eval()
    assert (cut(x).numpy() == whole.stages(x)[1].numpy()).all() and len(cut.stages(x)) == 2


def test_bottleneck_has_its_stride_in_the_3x3_convolution():
    block = ResNet(50).layer2[0]
    assert (block.conv1._stride, block.conv2._stride) == ([1, 1], [2, 2])


def test_resnet_equals_paddle_vision():
    paddle.seed(1)
    ours, theirs = ResNet(50), paddle.vision.models.resnet50(num_classes=0, with_pool=False)
    theirs.set_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    x = paddle.randn([1, 3, 64, 96])
    a, b = ours(x).numpy(), theirs(x).numpy()
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnet_sees_the_same_between_its_new_positions(depth, output_stride):
    paddle.seed(2)
    plain, dilated = ResNet(depth), ResNet(depth, output_stride)
    dilated.set_state_dict(plain.state_dict())
    plain.eval(), dilated.eval()
    x = paddle.randn([1, 3, 64, 96])
    step = 32 // output_stride
    a, b = plain.stages(x)[-1].numpy(), dilated.stages(x)[-1].numpy()[:, :, ::step, ::step]
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    assert [m.shape[2] for m in dilated.stages(x)] == [16, 8, max(4, 64 // output_stride), 64 // output_stride]


def test_initialisation_is_the_authors():
    paddle.seed(3)
    net, head = ResNet(50), DenseProjectionHead(2048, 2048, 128)
    for weight in (net.layer3[2].conv2.weight, net.layer1[0].conv3.weight, head.global_fc1.weight):
        fan_in = weight.shape[0] if weight.ndim == 2 else math.prod(weight.shape[1:])
        assert abs(float(weight.std()) / math.sqrt(2 / fan_in) - 1) < 0.03
    for conv in (head.dense_conv1, head.dense_conv2):
        for p in (conv.weight, conv.bias):
            bound = 1 / math.sqrt(2048)
            assert float(p.abs().max()) <= bound and abs(float(p.std()) * math.sqrt(3) / bound - 1) < 0.1
    assert float(net.layer4[2].bn3.weight.min()) == 1  # no zero-init of a block's last BatchNorm
    assert float(head.global_fc1.bias.abs().max()) == 0
    assert (net.bn1._momentum, net.bn1._epsilon) == (0.9, 1e-5)


# --- head, matching, queue ---

def test_head_shapes_and_average():
    head = DenseProjectionHead(8, 6, 4, num_grid=5)
    x, y, pooled = head(paddle.randn([2, 8, 7, 9]))
    assert (x.shape, y.shape, pooled.shape) == ([2, 4], [2, 4, 5, 5], [2, 4])
    assert np.allclose(y.numpy().mean((2, 3)), pooled.numpy(), atol=1e-6)


def test_match_takes_the_most_similar_key_and_of_equals_the_first():
    query = np.eye(3, dtype="float32")[None]
    key = np.array([[[0, 1, 0], [0, 1, 0], [1, 0, 0], [0.5, 0, 0.1]]], "float32")
    assert matching.match(paddle.to_tensor(query), paddle.to_tensor(key)).numpy().tolist() == [[2, 0, 3]]


def test_take_stays_within_its_picture():
    key = paddle.to_tensor(np.arange(2 * 3 * 2, dtype="float32").reshape(2, 3, 2))
    index = paddle.to_tensor(np.array([[2, 0, 2], [1, 1, 0]]))
    expected = [[[4, 5], [0, 1], [4, 5]], [[8, 9], [8, 9], [6, 7]]]
    assert matching.take(key, index).numpy().tolist() == expected


def test_random_match_is_uniform_and_a_function_of_seed_and_step():
    a = matching.random_match(400, 9, 16, seed=1, step=5).numpy()
    assert (a == matching.random_match(400, 9, 16, seed=1, step=5).numpy()).all()
    assert (a != matching.random_match(400, 9, 16, seed=1, step=6).numpy()).any()
    counts = np.bincount(a.ravel(), minlength=16)
    assert counts.min() > 150 and counts.max() < 300


@pytest.mark.parametrize("length, batches", [(8, [3, 3, 3, 3]), (8, [8]), (5, [12]), (7, [5, 9, 1]), (4, [4, 4])])
def test_queue_is_a_ring_for_any_batch(length, batches):
    queue, expected, pointer = NegativeQueue(length, 2), None, 0
    assert np.allclose(np.linalg.norm(queue.keys.numpy(), axis=1), 1, atol=1e-6)
    expected = queue.keys.numpy().copy()
    value = 0
    for n in batches:
        rows = np.arange(value, value + n)
        value += n
        for row in rows:
            expected[pointer] = row
            pointer = (pointer + 1) % length
        queue.enqueue(paddle.to_tensor(np.repeat(rows[:, None], 2, 1).astype("float32")))
        assert (queue.keys.numpy() == expected).all() and int(queue.pointer) == pointer


# --- the method ---

@pytest.mark.parametrize("grid", [None, 1, 3, 5, 7, 9])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_grids_and_non_square_maps(grid, size):
    model = small(num_grid=grid)
    out = model(*views(size=size), watch=True)
    positions = grid * grid if grid else size[0] * size[1] // 32 ** 2
    assert out.matches.shape == [2, positions] and int(out.matches.max()) < positions
    assert np.isfinite(float(out.loss)) and 0 <= float(out.watched["matched_share"]) <= 1
    out.loss.backward()
    assert float(model.encoder_q.head.dense_conv1.weight.grad.abs().max()) > 0


def test_one_step_of_lambda_0_is_a_moco_v2_step():
    """Against a step written out here in plain operations, weights included."""
    model, (x_q, x_k) = small(loss_lambda=0.0, momentum=0.9), views(n=4)
    assert not any("dense" in name for name in model.state_dict())
    twin = small(loss_lambda=0.0)
    query, key = twin.encoder_q, twin.encoder_k
    queue = model.queue.keys.numpy().copy()

    optimizers = [paddle.optimizer.Momentum(0.1, 0.9, [p for p in layer.parameters() if not p.stop_gradient], weight_decay=1e-4)
                  for layer in (model, query)]
    for step in range(2):
        model.update_key_encoder()
        out = model(x_q, x_k, step=step)
        out.loss.backward()
        optimizers[0].step(), optimizers[0].clear_grad()
        model.enqueue(out)

        def embed(encoder, x):
            h = encoder.backbone(normalise(x)).mean([2, 3])
            return F.normalize(encoder.head.global_fc2(F.relu(encoder.head.global_fc1(h))), axis=1)

        with paddle.no_grad():
            for p, k in zip(query.parameters(), key.parameters()):
                if not p.stop_gradient:
                    k.set_value(k * 0.9 + p * (1 - 0.9))
            k = embed(key, x_k)
        q = embed(query, x_q)
        loss = info_nce_plain(q, k, paddle.to_tensor(queue), 0.2)
        loss.backward()
        optimizers[1].step(), optimizers[1].clear_grad()
        queue[step * 4:step * 4 + 4] = k.numpy()
        assert abs(float(out.loss) - float(loss)) < 1e-5
        assert out.loss_dense is None and out.loss is out.loss_global
    assert np.abs(model.queue.keys.numpy() - queue).max() < 1e-5
    for name, value in query.state_dict().items():
        assert np.abs(model.encoder_q.state_dict()[name].numpy() - value.numpy()).max() < 1e-4, name


def test_loss_is_the_weighted_sum_and_warmup_holds_the_dense_one_back():
    model = small(loss_lambda=0.3, lambda_warmup_iters=2)
    for step, weight in ((0, 0.0), (1, 0.0), (2, 0.3)):
        out = model(*views(), step=step)
        assert out.loss_lambda == weight
        expected = (1 - weight) * float(out.loss_global) + weight * float(out.loss_dense)
        assert abs(float(out.loss) - expected) < 1e-6


def test_dense_loss_matches_by_backbone_features_against_the_dense_queue():
    model, (x_q, x_k) = small(), views()
    out = model(x_q, x_k)
    with paddle.no_grad():
        _, r, _, f_q = model.encoder_q(normalise(x_q))
        _, t, pooled, f_k = model.encoder_k(normalise(x_k))
        index = paddle.matmul(f_q, f_k, transpose_y=True).argmax(2).numpy()
        positive = np.stack([t.numpy()[i][index[i]] for i in range(2)])
        loss = info_nce_plain(r.reshape([-1, 16]), paddle.to_tensor(positive.reshape(-1, 16)), model.queue_dense.keys, 0.2)
    assert (out.matches.numpy() == index).all()
    assert abs(float(out.loss_dense) - float(loss)) < 1e-5
    assert np.allclose(out.keys_dense.numpy(), pooled.numpy(), atol=1e-6)


@pytest.mark.parametrize("strategy", ["embedding", "random"])
def test_other_matchings(strategy):
    model, (x_q, x_k) = small(matching=strategy, num_grid=4), views()
    out = model(x_q, x_k, step=3)
    if strategy == "embedding":
        with paddle.no_grad():
            r, t = model.encoder_q(normalise(x_q))[1], model.encoder_k(normalise(x_k))[1]
        expected = matching.match(r, t)
    else:
        expected = matching.random_match(2, 16, 16, 0, 3)
    assert (out.matches.numpy() == expected.numpy()).all()


def test_batchnorm_groups_see_their_own_statistics_and_rows_come_back_in_order():
    one, two = small(), small(bn_groups=2)
    pair = views(n=4)
    for model in (one, two):
        model.eval()  # the same statistics for all groups: only the order could differ
    a, b = one(*pair, step=3), two(*pair, step=3)
    assert np.allclose(a.keys.numpy(), b.keys.numpy(), atol=1e-5)
    assert np.allclose(a.keys_dense.numpy(), b.keys_dense.numpy(), atol=1e-5)
    assert (a.matches.numpy() == b.matches.numpy()).all() and abs(float(a.loss) - float(b.loss)) < 1e-5
    two.train()
    halves = [two.encoder_q(normalise(part))[0].numpy() for part in pair[0].split(2)]
    assert np.allclose(np.concatenate(halves), two._in_groups(two.encoder_q, normalise(pair[0]))[0].numpy(), atol=1e-5)


def test_the_key_encoder_follows_in_its_parameters_and_keeps_its_own_statistics():
    model = small(momentum=0.75)
    q, k = model.encoder_q.backbone, model.encoder_k.backbone
    assert (q.conv1.weight.numpy() == k.conv1.weight.numpy()).all()  # key starts as a copy
    q.conv1.weight.set_value(q.conv1.weight + 1.0)
    q.bn1._mean.set_value(q.bn1._mean + 5.0)
    before = k.conv1.weight.numpy(), k.bn1._mean.numpy().copy()
    model.update_key_encoder()
    assert np.allclose(k.conv1.weight.numpy(), before[0] * 0.75 + q.conv1.weight.numpy() * 0.25, atol=1e-6)
    assert (k.bn1._mean.numpy() == before[1]).all()
    model.train()
    out = model(*views())
    assert (k.bn1._mean.numpy() != before[1]).any()  # its own forward, in train mode
    out.loss.backward()
    assert all(p.grad is None for p in model.encoder_k.parameters())


def test_uint8_input_is_normalised_on_the_device():
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (x / 255.0 - np.array(densecl.MEAN)) / np.array(densecl.STD)
    assert np.abs(normalise(paddle.to_tensor(x)).numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5


def test_sync_bn_changes_the_kind_of_batchnorm_and_nothing_else():
    models = []
    for sync_bn in (False, True):
        paddle.seed(0)
        models.append(DenseCL("resnet18", queue_len=8, stages=1, sync_bn=sync_bn))
    plain, sync = models
    assert list(plain.state_dict()) == list(sync.state_dict())
    assert all((a.numpy() == b.numpy()).all() for a, b in zip(plain.state_dict().values(), sync.state_dict().values()))
    assert len(plain._pairs) == len(sync._pairs) and all(k.stop_gradient and not q.stop_gradient for q, k in sync._pairs)
    norms = [layer for layer in sync.sublayers() if "BatchNorm" in type(layer).__name__]
    assert len(norms) == 10 and all(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in norms)
