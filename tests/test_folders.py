"""Folders as they are found in the wild: each is paired and read right, or refused with words that name the files."""

import inspect
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from imagetools import save
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from unet_nbtrain.augmentation import get_augmentation_pipeline
from unet_nbtrain.dataset import SegmentationDataset, create_dataloaders
from unet_nbtrain.file_names import relative_names
from unet_nbtrain.image_files import check_foreground, read_header, read_image, read_labels, read_mask, read_pair_header
from unet_nbtrain.mask_report import describe_masks
from unet_nbtrain.pairing import pair_files
from unet_nbtrain.splits import split_positions


def touch(folder, names):
    "Make empty files; names are separated by blanks"
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def names(pairs, folder):
    return " ".join(f"{i.name}+{m.name}" for i, m in pairs)


# Names that are paired with default arguments


LAYOUTS = {
    "same name": ("1.png 2.png 10.png", "1.png 2.png 10.png", "1.png+1.png 2.png+2.png 10.png+10.png"),
    "VOC": ("2007_000032.jpg 2007_000039.jpg", "2007_000032.png 2007_000039.png", "2007_000032.jpg+2007_000032.png 2007_000039.jpg+2007_000039.png"),
    "Carvana": ("ff_01.jpg ff_02.jpg", "ff_01_mask.gif ff_02_mask.gif", "ff_01.jpg+ff_01_mask.gif ff_02.jpg+ff_02_mask.gif"),
    "ISIC": ("ISIC_0000000.jpg ISIC_0000001.jpg", "ISIC_0000000_segmentation.png ISIC_0000001_Segmentation.png",
             "ISIC_0000000.jpg+ISIC_0000000_segmentation.png ISIC_0000001.jpg+ISIC_0000001_Segmentation.png"),
    "DRIVE": ("21_training.tif 22_training.tif", "21_manual1.gif 22_manual1.gif", "21_training.tif+21_manual1.gif 22_training.tif+22_manual1.gif"),
    "DRIVE, one": ("21_training.tif", "21_manual1.gif", "21_training.tif+21_manual1.gif"),
    "DRIVE, field of view": ("21_training.tif 22_training.tif", "21_training_mask.gif 22_training_mask.gif",
                             "21_training.tif+21_training_mask.gif 22_training.tif+22_training_mask.gif"),
    "CamVid": ("0001TP_1.png 0001TP_2.png", "0001TP_1_L.png 0001TP_2_L.png", "0001TP_1.png+0001TP_1_L.png 0001TP_2.png+0001TP_2_L.png"),
    "nnU-Net": ("la_003_0000.png la_004_0000.png", "la_003.png la_004.png", "la_003_0000.png+la_003.png la_004_0000.png+la_004.png"),
    "Cityscapes": ("aachen/aachen_000000_000019_leftImg8bit.png bochum/bochum_000000_000019_leftImg8bit.png",
                   "aachen/aachen_000000_000019_gtFine_labelIds.png bochum/bochum_000000_000019_gtFine_labelIds.png",
                   "aachen_000000_000019_leftImg8bit.png+aachen_000000_000019_gtFine_labelIds.png "
                   "bochum_000000_000019_leftImg8bit.png+bochum_000000_000019_gtFine_labelIds.png"),
    "COCO-Stuff": ("000000000139.jpg 000000000285.jpg", "000000000139.png 000000000285.png", "000000000139.jpg+000000000139.png 000000000285.jpg+000000000285.png"),
    "capital letters": ("A1.PNG a2.JPG", "A1_Mask.TIF a2_MASK.PNG", "A1.PNG+A1_Mask.TIF a2.JPG+a2_MASK.PNG"),
    "before": ("1.png 2.png", "mask_1.png mask_2.png", "1.png+mask_1.png 2.png+mask_2.png"),
    "before, other words": ("a.png b.png", "Label-a.png GT b.png".replace("GT b", "GT_b"), "a.png+Label-a.png b.png+GT_b.png"),
    "both before": ("img_001.png img_002.png", "mask_001.png mask_002.png", "img_001.png+mask_001.png img_002.png+mask_002.png"),
    "both after": ("001_image.tif 002_image.tif", "001_mask.png 002_mask.png", "001_image.tif+001_mask.png 002_image.tif+002_mask.png"),
    "raw and label": ("cell12_raw.png cell7_raw.png", "cell12_label.png cell7_label.png", "cell7_raw.png+cell7_label.png cell12_raw.png+cell12_label.png"),
    "zeros": ("train_7.tif train_12.tif", "labels-007.png labels-012.png", "train_7.tif+labels-007.png train_12.tif+labels-012.png"),
    "number": ("volume9.png volume10.png", "truth (9).png truth (10).png".replace(" (", "_(").replace(" t", "|t").replace("|", " "),
               "volume9.png+truth_(9).png volume10.png+truth_(10).png"),
    "patients": ("p1/s1.png p1/s2.png p2/s1.png", "p1/s1.png p1/s2.png p2/s1.png", "s1.png+s1.png s2.png+s2.png s1.png+s1.png"),
    "nested images, flat masks": ("p1/a.png p2/b.png", "a_mask.png b_mask.png", "a.png+a_mask.png b.png+b_mask.png"),
    "rubbish": ("1.png ._1.png Thumbs.db .DS_Store notes.txt", "1.png ._1.png desktop.ini", "1.png+1.png"),
}  # fmt: skip


@pytest.mark.parametrize("images, masks, wanted", LAYOUTS.values(), ids=LAYOUTS)
def test_two_folders(tmp_path, images, masks, wanted):
    pairs = pair_files(touch(tmp_path / "i", images), touch(tmp_path / "m", masks))
    assert names(pairs, tmp_path) == wanted
    assert pairs == pair_files([i for i, _ in pairs][::-1], [m for _, m in pairs]), "the same files as lists, in another order"
    if "/" not in images + masks:
        mixed = {i for i, _ in pairs} | {m for _, m in pairs}
        assert all(p.parent.name in "im" for p in mixed)


@pytest.mark.parametrize(
    "files, wanted",
    [
        ("1.png 1_mask.png 2.png 2_mask.png", "1.png+1_mask.png 2.png+2_mask.png"),
        ("119_sat.jpg 119_mask.png 2334_sat.jpg 2334_mask.png", "119_sat.jpg+119_mask.png 2334_sat.jpg+2334_mask.png"),
        ("img_1.png mask_1.png img_2.png mask_2.png", "img_1.png+mask_1.png img_2.png+mask_2.png"),
        ("P1/P1_1.tif P1/P1_1_mask.tif P2/P2_1.tif P2/P2_1_mask.tif", "P1_1.tif+P1_1_mask.tif P2_1.tif+P2_1_mask.tif"),
        ("images/1.png images/2.png masks/1.png masks/2.png", "1.png+1.png 2.png+2.png"),
        ("c1/image.png c1/mask.png c2/image.png c2/mask.png", "image.png+mask.png image.png+mask.png"),
        ("1.jpg 1.png 2.jpg 2.png", "1.jpg+1.png 2.jpg+2.png"),
    ],
)
def test_everything_in_one_folder(tmp_path, files, wanted):
    folder = touch(tmp_path / "all", files)
    pairs = pair_files(folder, folder)
    assert names(pairs, tmp_path) == wanted and all(i != m for i, m in pairs)
    assert len({m for _, m in pairs}) == len(pairs) == len(files.split()) // 2
    assert all(i.parent == m.parent or {i.parent.name, m.parent.name} == {"images", "masks"} for i, m in pairs)


@pytest.mark.parametrize(
    "images, masks, options, wanted",
    [
        ("a.png b.png", "a-x.png b-x.png a-y.png", {"mask_suffix": "-x"}, "a.png+a-x.png b.png+b-x.png"),
        ("a.png", "a_1stHO.png a_2ndHO.png", {"mask_suffix": "_2ndHO"}, "a.png+a_2ndHO.png"),
        ("a.png", "gt_a_v2.png gt_a_v1.png", {"mask_pattern": "gt_{name}_v2"}, "a.png+gt_a_v2.png"),
        ("x_leftImg8bit.png", "x_gtFine_labelIds.png x_gtFine_color.png x_gtFine_instanceIds.png", {"mask_suffix": "_gtFine_labelIds"},
         "x_leftImg8bit.png+x_gtFine_labelIds.png"),
        ("ab-s07-q.png cd-s08-r.png", "zz_s7_1.png yy_s8_2.png", {"mask_pattern": r"s(\d+)"}, "ab-s07-q.png+zz_s7_1.png cd-s08-r.png+yy_s8_2.png"),
        ("im0001.ppm", "im0001.ah.ppm im0001.vk.ppm", {"mask_suffix": ".ah"}, "im0001.ppm+im0001.ah.ppm"),
    ],
)  # fmt: skip
def test_told_what_a_mask_is_called(tmp_path, images, masks, options, wanted):
    i, m = touch(tmp_path / "i", images), touch(tmp_path / "m", masks)
    assert names(pair_files(i, m, **options), tmp_path) == wanted


# Names that are refused


@pytest.mark.parametrize(
    "images, masks, told",
    [
        ("1.png 2.png 3.png", "1.png 2.png", r"2 pairs found.*without mask \(1\): 3\.png"),
        ("1.png", "1.png 9.png", r"without image \(1\): 9\.png"),
        ("1.png", "1_mask.png 1_gt.png", r"1\.png has 2 masks: 1_gt\.png, 1_mask\.png"),
        ("1.png", "1.png 1.gif", r"1\.png has 2 masks: 1\.gif, 1\.png"),
        ("1.png 1.jpg", "1.png", r"1\.jpg and 1\.png would share the mask 1\.png"),
        ("train_1.png test_1.png", "label_1.png", r"test_1\.png.*train_1\.png|label_1\.png"),
        ("train_1.png train_2.png", "test_1_mask.png test_2_mask.png", r"train_1\.png, train_2\.png.*test_1_mask\.png, test_2_mask\.png"),
        ("liver_1.png liver_2.png", "kidney_1.png kidney_2.png", r"liver_1\.png.*kidney_1\.png"),
        ("p1_001.png p1_002.png", "p2_001_mask.png p2_002_mask.png", r"p1_001\.png.*p2_001_mask\.png"),
        ("2020_1.png 2020_2.png", "2021_1.png 2021_2.png", r"2020_1\.png.*2021_1\.png"),
        ("1_2.png 2_1.png", "m_1_2_x.png m_2_1_y.png", r"1_2\.png.*m_1_2_x\.png"),
        ("x_7.png x_007.png", "mask_7.png mask_8.png", r"x_7\.png|x_007\.png"),
        ("img0.png img1.png img2.png", "mask1.png mask2.png mask3.png", r"img0\.png.*mask3\.png"),
        ("c_0000.png c_0001.png d_0000.png d_0001.png", "c.png d.png", r"c_0001\.png"),
        ("x_leftImg8bit.png", "x_gtFine_labelIds.png x_gtFine_color.png", r"x_gtFine_color\.png"),
        ("a.png b.png", "c.png d.png", r"0 pairs found.*a\.png, b\.png.*c\.png, d\.png.*mask_suffix=.*mask_pattern="),
    ],
)  # fmt: skip
def test_what_is_not_guessed(tmp_path, images, masks, told):
    i, m = touch(tmp_path / "i", images), touch(tmp_path / "m", masks)
    with pytest.raises(ValueError, match=told):
        pair_files(i, m)


def test_data_science_bowl_has_a_mask_for_each_nucleus(tmp_path):
    folder = touch(tmp_path / "stage1", "0a1/images/0a1.png 0a1/masks/77f.png 0a1/masks/8e2.png 3b9/images/3b9.png 3b9/masks/c01.png")
    with pytest.raises(ValueError, match=r"0a1\.png.*77f\.png"):
        pair_files(folder, folder)
    with pytest.raises(ValueError, match=r"0a1\.png.*77f\.png"):
        pair_files(sorted(folder.glob("*/images/*")), sorted(folder.glob("*/masks/*")))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"mask_suffix": "_nope"}, r"\{name\}_nope.*1_mask\.png"),
        ({"mask_pattern": "nope_{name}"}, r"nope_\{name\}.*1_mask\.png"),
        ({"mask_pattern": "(1"}, "not a regular expression"),
        ({"mask_pattern": "[xyz]"}, r"1\.png"),
        ({"mask_suffix": "_mask", "mask_pattern": "{name}_mask"}, "Pass one of them"),
    ],
)
def test_wrong_patterns(tmp_path, options, told):
    i, m = touch(tmp_path / "i", "1.png"), touch(tmp_path / "m", "1_mask.png")
    with pytest.raises(ValueError, match=told):
        pair_files(i, m, **options)


def test_one_folder_without_masks(tmp_path):
    folder = touch(tmp_path / "all", "1.png 2.png 3.png")
    with pytest.raises(ValueError, match=r"1\.png, 2\.png, 3\.png"):
        pair_files(folder, folder)


# Images


GREY = (np.arange(40 * 32) % 251).astype(np.uint8).reshape(40, 32)
COLOR = np.stack([GREY, GREY // 3, 255 - GREY], -1)
FIRST = np.moveaxis(COLOR, 2, 0)


def test_more_kinds_of_images(tmp_path):
    bands = np.stack([GREY // n for n in range(1, 8)])
    for name, array, wanted in [
        ("bands.npy", bands, bands),
        ("last.npy", np.moveaxis(bands, 0, 2), bands),
        ("float.npy", bands / 255, (bands / 255).astype(np.float32)),
        ("int16.npy", GREY.astype(np.int16) * 9, GREY.astype(np.uint16)[None] * 9),
        ("bool.npy", GREY > 9, (GREY > 9).astype(np.float32)[None]),
        ("one.webp", Image.fromarray(COLOR), None),
        ("g.PGM", GREY, GREY[None]),
        ("flat.npy", GREY[..., None], GREY[None]),
    ]:
        got = read_image(save(tmp_path / name, array))
        assert wanted is None or (got.dtype == wanted.dtype and np.array_equal(got, wanted)), name
        assert tuple(read_header(tmp_path / name)) == (*got.shape[1:], len(got)), name
    np.savez_compressed(tmp_path / "z.npz", image=COLOR)
    assert np.array_equal(read_image(tmp_path / "z.npz"), FIRST)
    tall = save(tmp_path / "tall.png", COLOR[:, :2])
    assert read_image(tall).shape == (3, 40, 2) and read_header(tall) == (40, 2, 3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 3])
def test_png_of_any_depth(tmp_path, bits, kind):
    "Grey values are scaled to white, palette entries are looked up; a mask keeps palette entries and class indices"
    if (bits, kind) == (16, 3):
        pytest.skip("palettes have at most 8 bits")
    rows = np.arange(16).reshape(2, 8) % min(4, 2**bits)
    path = tmp_path / f"{bits}_{kind}.png"
    path.write_bytes(png(rows, bits, kind))
    if kind == 3:
        assert np.array_equal(read_labels(path), rows) and read_image(path).shape == (3, 2, 8)
    else:
        image = read_image(path)
        assert np.allclose(image[0] / np.iinfo(image.dtype).max, rows / (2**bits - 1), atol=1e-6)


def png(rows, bits, kind):
    "A PNG file made by hand: rows of values below 2**bits, kind 0 is grey and 3 a palette"
    dense = "".join
    body = b"".join(
        b"\0" + int(dense(f"{v:0{bits}b}" for v in row), 2).to_bytes(len(row) * bits // 8, "big") for row in rows
    )
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, kind, 0, 0, 0)
    colors = bytes([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0][: 3 * min(4, 2**bits)])
    parts = [(b"IHDR", head), *([(b"PLTE", colors)] if kind == 3 else []), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)


@pytest.mark.parametrize(
    "name, array, told",
    [
        ("white.tif", GREY.astype(np.float32) * 200, r"white\.tif: floating-point values from 0 to 50000.*same divisor"),
        ("nan.npy", np.where(GREY > 9, np.nan, 0.5), r"nan\.npy: \d+ pixels that are not a number"),
        ("ct.npy", GREY.astype(np.int16) - 100, r"ct\.npy: integers from -100 to 150.*uint16"),
        ("deep.tif", GREY.astype(np.int32) * 9999, r"deep\.tif: integers from 0 to 2499750"),
        ("long.npy", GREY.astype(np.int64), r"long\.npy: integers of type int64.*uint8 or uint16"),
        ("cube.npy", np.zeros((30, 30, 30), np.uint8), r"cube\.npy: .*\(30, 30, 30\) does not show"),
        ("volume.npy", np.zeros((100, 128, 64), np.uint8), r"volume\.npy: .*\(100, 128, 64\)"),
        ("line.npy", np.zeros(9, np.uint8), r"line\.npy: .*\(9,\)"),
        ("none.npy", np.zeros((0, 4), np.uint8), r"none\.npy: .*\(0, 4\)"),
        ("text.npy", np.full((4, 4), "x"), r"text\.npy: values of type"),
    ],
)
def test_images_that_are_refused(tmp_path, name, array, told):
    with pytest.raises(ValueError, match=told):
        read_image(save(tmp_path / name, array))


def test_pages(tmp_path):
    pages = [Image.fromarray(GREY // n) for n in (1, 2, 3, 4)]
    channels = save(tmp_path / "channels.tif", pages[0], save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(channels), np.stack([GREY // n for n in (1, 2, 3, 4)])) and read_header(channels) == (40, 32, 4)
    with pytest.raises(ValueError, match=r"channels\.tif: the mask has 4 pages"):
        read_labels(channels)
    stack = save(tmp_path / "stack.tif", pages[0], save_all=True, append_images=pages[1:], description="ImageJ=1.5\nimages=4\nslices=4")
    with pytest.raises(ValueError, match=r"stack\.tif: it has 4 pages, a stack of 4 slices"):
        read_image(stack)
    rgb = save(tmp_path / "rgb.tif", Image.fromarray(COLOR), save_all=True, append_images=[Image.fromarray(COLOR)])
    with pytest.raises(ValueError, match=r"rgb\.tif: it has 2 pages, which are not the channels"):
        read_header(rgb)
    with pytest.raises(ValueError, match=r"moving\.gif: it has 4 pages"):
        read_image(save(tmp_path / "moving.gif", pages[0], save_all=True, append_images=pages[1:]))


def test_a_tiff_beyond_pillow_names_a_way_out(tmp_path):
    path = tmp_path / "eight_bands.tif"
    tags = [(256, 3, 4), (257, 3, 4), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 8), (278, 3, 4), (279, 4, 128)]
    body = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    path.write_bytes(body.ljust(200, b"\0") + bytes(128))
    with pytest.raises(ValueError, match=r"eight_bands\.tif: .*NumPy array \(\.npy\)"):
        read_image(path)


# Masks


LABELS = (np.arange(40 * 32) % 4).astype(np.uint8).reshape(40, 32)
VOC = ["#000000", "#800000", (0, 128, 0), "808000"]
PAINT = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)[LABELS]


def test_painted_masks(tmp_path):
    palette = Image.fromarray(LABELS).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    mapping = {"#000000": 0, (128, 0, 0): 1, "#008000": 1, "#808000": 255}
    alpha = np.dstack([PAINT, np.full_like(LABELS, 255)])
    for name, mask in {"a.png": PAINT, "b.bmp": PAINT, "c.tif": PAINT, "d.npy": PAINT, "e.png": palette, "f.png": alpha, "g.gif": palette}.items():
        path = save(tmp_path / name, mask)
        assert np.array_equal(read_labels(path, VOC), LABELS) and np.array_equal(read_mask(path, 4, colors=VOC), LABELS), name
        assert np.array_equal(read_mask(path, 2, ignore_index=255, colors=mapping), np.array([0, 1, 1, 255])[LABELS]), name
    with pytest.raises(ValueError, match=r"a\.png: labels outside 0 to 1: 255"):
        read_mask(tmp_path / "a.png", 2, colors=mapping)
    assert np.array_equal(read_mask(tmp_path / "a.png", foreground=[1, 2], colors=VOC), np.array([0, 1, 1, 0])[LABELS])


def test_unknown_colors_are_named(tmp_path):
    path = save(tmp_path / "a.png", PAINT)
    with pytest.raises(ValueError, match=r"a\.png: the mask is in colour: 4 colours, .*colors=\['#000000', '#008000', '#800000', '#808000'\]"):
        read_labels(path)
    with pytest.raises(ValueError, match=r"a\.png: a colour is not in the table: #808000 \(320 pixels; nearest is #008000 of class 3\)"):
        read_labels(path, VOC[:2] + ["#0000ff", "#008000"])
    smeared = save(tmp_path / "a.jpg", PAINT, quality=50)
    with pytest.raises(ValueError, match=r"a\.jpg: \d+ colours are not in the table.*JPEG"):
        read_labels(smeared, VOC)
    with pytest.raises(ValueError, match="class 0 and for class 1"):
        read_labels(path, ["#000000", (0, 0, 0)])


def test_more_kinds_of_masks(tmp_path):
    planes = LABELS == np.arange(4)[:, None, None]
    for name, mask in {
        "bool.npy": planes, "float.npy": planes.astype(float), "last.npy": np.moveaxis(planes, 0, 2),
        "one.npy": LABELS[..., None], "first.npy": LABELS[None], "whole.npy": LABELS.astype(np.float32), "three.npy": np.dstack([LABELS] * 3),
        "i16.tif": LABELS.astype(np.uint16), "f.tif": LABELS.astype(np.float32), "i64.npy": LABELS.astype(np.int64), "u32.npy": LABELS.astype(np.uint32),
    }.items():  # fmt: skip
        assert np.array_equal(read_mask(save(tmp_path / name, mask), 4), LABELS), name
    two = np.stack([LABELS != 1, LABELS == 1])
    assert np.array_equal(read_mask(save(tmp_path / "two.npy", two)), LABELS == 1), "not its first plane, the background"
    for name in ("one_bit.png", "bool.npy"):
        assert np.array_equal(read_mask(save(tmp_path / name, LABELS > 1)), LABELS > 1)


@pytest.mark.parametrize(
    "name, mask, options, told",
    [
        ("multi.npy", np.stack([LABELS, LABELS + 1]), {}, r"multi\.npy: the mask has 2 planes.*one-hot"),
        ("soft.npy", LABELS / 7, {}, r"soft\.npy: the mask has fractions"),
        ("nan.npy", np.where(LABELS, np.nan, 0), {}, r"nan\.npy: the mask has fractions"),
        ("minus.npy", np.where(LABELS, -1, 0), {}, r"minus\.npy: the value -1 is neither.*ignore_index=-1"),
        ("minus.npy", LABELS.astype(int) - 1, {"n_classes": 3}, r"minus\.npy: labels outside 0 to 2: -1 \(25\.0%\)"),
        ("huge.npy", LABELS.astype(np.uint64) + 2**40, {"n_classes": 4}, r"huge\.npy: .*beyond 32 bits"),
        ("void.png", np.where(LABELS == 3, 255, LABELS), {"n_classes": 3}, r"void\.png: labels outside 0 to 2: 255 \(25\.0%\)"),
        ("clear.png", np.dstack([LABELS * 0, LABELS * 80]), {}, r"clear\.png: .*transparency"),
        ("x.png", LABELS, {"n_classes": 4, "ignore_index": 2**40}, r"x\.png: ignore_index=1099511627776 cannot be"),
        ("x.png", LABELS, {"n_classes": 4, "ignore_index": 2.5}, r"x\.png: ignore_index=2\.5 cannot be"),
    ],
)
def test_masks_that_are_refused(tmp_path, name, mask, options, told):
    with pytest.raises(ValueError, match=told):
        read_mask(save(tmp_path / name, np.asarray(mask)), **options)


def test_jpeg_masks_of_one_class(tmp_path):
    disk = (np.hypot(*np.mgrid[-32:32, -32:32]) < 20).astype(np.uint8)
    path = save(tmp_path / "kvasir.jpg", disk * 255, quality=75)
    with pytest.raises(ValueError, match=r"kvasir\.jpg: \d+ values, .*range\(128, 256\).*JPEG.*PNG"):
        read_mask(path)
    assert (read_mask(path, foreground=range(128, 256)) != disk).mean() < 0.01


@pytest.mark.parametrize("ignore", [300, -100, 255])
def test_an_ignored_value_never_wraps(tmp_path, ignore):
    "300 in 8 bits is 44: a class that nobody has"
    mask = read_mask(save(tmp_path / "m.png", LABELS), 4, ignore_index=ignore)
    filled = torch.from_numpy(mask).clone()
    filled[0] = ignore
    assert filled[0].unique().tolist() == [ignore] and np.array_equal(mask, LABELS)
    assert mask.dtype == (np.uint8 if ignore == 255 else np.int32)


# The report


def write_set(folder, masks, images=None, suffix="_mask"):
    for i, mask in enumerate(masks):
        save(folder / "i" / f"{i}.png", images[i] if images else np.full((*np.shape(mask)[:2], 3), 10 * i, np.uint8))
        save(folder / "m" / f"{i}{suffix}.png", np.asarray(mask, np.uint8))
    return folder / "i", folder / "m"


def test_the_report_stops_on_what_cannot_be_right(tmp_path):
    folders = write_set(tmp_path, [LABELS, np.where(LABELS == 3, 255, LABELS)])
    with pytest.raises(ValueError, match=r"1_mask\.png: labels outside 0 to 3: 255"):
        describe_masks(*folders, n_classes=4)
    assert describe_masks(*folders, n_classes=4, ignore_index=255)["classes"].keys() == {0, 1, 2, 3}
    assert describe_masks(*folders)["warnings"], "without the number of classes it says what is there"
    save(folders[0] / "1.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"1\.png and 1_mask\.png: the image is 9 x 9 .*mask 40 x 32"):
        describe_masks(*folders)
    (folders[1] / "0_mask.png").unlink()
    with pytest.raises(ValueError, match=r"without mask \(1\): 0\.png"):
        describe_masks(*folders)


def test_the_report_counts_what_the_masks_hold(tmp_path):
    folders = write_set(tmp_path, [PAINT, PAINT * 0, PAINT], suffix="-paint")
    report = describe_masks(*folders, n_classes=4, colors=VOC, mask_pattern="{name}-paint", class_names=["bg", "<b>", "car", "sky"])
    assert report["classes"] == {0: 0.5, 1: 1 / 6, 2: 1 / 6, 3: 1 / 6} and report["empty"] == 1 / 3 and report["channels"] == {3: 3}
    assert report["occurs"] == {0: 1, 1: 2 / 3, 2: 2 / 3, 3: 2 / 3} and report["sizes"] == {"40 x 32": 3} == report["image_sizes"]
    weights = report.class_weights()
    assert torch.allclose(weights, torch.tensor([0.4, 1.2, 1.2, 1.2])) and weights.dtype == torch.float32
    html = report._repr_html_()
    assert "<b>" not in html and "1 &lt;b&gt;" in html and "data:image/png;base64," in html and len(html) < 64_000
    assert "2 car" in str(report) and report.picture()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 300, 300, 3), dtype=np.uint8)
    report = describe_masks(*write_set(tmp_path, [noise[i, ..., 0] > 99 for i in range(4)], list(noise)))
    assert len(report.picture()) <= 44_000


def test_limit_is_spread_evenly(tmp_path):
    folders = write_set(tmp_path, [np.full((4, 4), i >= 10) for i in range(20)])
    report = describe_masks(*folders, limit=4)
    assert (report["pairs"], report["looked_at"], report["classes"][1]) == (20, 4, 0.5) and "looked at 4 of 20" in str(report)


@pytest.mark.parametrize(
    "masks, told",
    [
        ([LABELS * 0] * 3, "nothing to learn"),
        ([LABELS > 0] * 3, "75% of the pixels; predicting it everywhere scores a Dice of 0.86"),
        ([LABELS > 2, LABELS * 0, LABELS * 0], "67% of the masks have no foreground"),
        ([LABELS == 0, (LABELS == 0)[:20]], "2 sizes"),
        ([(LABELS == 0) * 255, LABELS == 0], "3 values in masks for one class"),
    ],
)
def test_doubts(tmp_path, masks, told):
    warnings = describe_masks(*write_set(tmp_path, masks))["warnings"]
    assert any(told in warning for warning in warnings), warnings


class Foreign(Dataset):
    "A data set of somebody else"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_every_kind_of_data_set_gives_the_same_report():
    masks = [LABELS == i % 3 for i in range(6)]
    ours = SegmentationDataset([COLOR] * 6, [m.astype(np.uint8) for m in masks])
    samples = [(torch.zeros(3, 40, 32), torch.from_numpy(m)[None].float()) for m in masks]
    wanted = describe_masks(ours)["classes"]
    dicts = Foreign([{"image": a, "mask": b[0].long()} for a, b in samples])
    for source in (
        DataLoader(ours, 2), Foreign(samples), dicts, DataLoader(dicts, 4), iter(DataLoader(dicts, 4)),
        ConcatDataset([Subset(ours, [0, 2, 4]), Subset(ours, [1, 3, 5])]), DataLoader(Subset(ours, range(6)), 3),
    ):  # fmt: skip
        report = describe_masks(source)
        assert report["classes"] == wanted and report["pairs"] == 6 and report.picture()


def test_samples_that_cannot_be_right():
    image = torch.zeros(3, 40, 32)
    for mask, options, told in [
        (torch.from_numpy(LABELS), {"n_classes": 3}, "sample 0: labels outside 0 to 2: 3"),
        (torch.zeros(40, 30), {}, "sample 0: the image is 40 x 32 pixels and its mask 40 x 30"),
        (torch.full((40, 32), 0.5), {}, "sample 0: the mask has fractions"),
        (torch.zeros(4, 40, 32), {}, "argmax"),
        (torch.full((40, 32), 255), {"n_classes": 1}, "mask / 255"),
    ]:
        with pytest.raises(ValueError, match=told):
            describe_masks([(image, mask)], **options)


# Files that Pillow reads wrong, or only with a half of their bits


def deep_png(path, pixels):
    "A PNG with 16 bits for each of the channels of (H, W, C)"
    kind = {2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def deep_tiff(path, pixels, order):
    "An RGB TIFF with 16 bits a channel, without compression, in either order of bytes"
    height, width, _ = pixels.shape
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 206), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, pixels.size * 2)]
    body = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + (struct.pack(order + "HH", value, 0) if kind == 3 and count == 1 else struct.pack(order + "I", value))
    path.write_bytes(body.ljust(200, b"\0") + struct.pack(order + "HHH", 16, 16, 16) + pixels.astype(order + "u2").tobytes())
    return path


def test_all_bits_of_16_bit_color(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (9, 12, 4)).astype(np.uint16)
    files = {deep_png(tmp_path / f"{n}.png", deep[..., :n]): 1 if n == 2 else 3 for n in (2, 3, 4)}
    files |= {deep_tiff(tmp_path / f"{name}.tif", deep[..., :3], order): 3 for name, order in (("little", "<"), ("big", ">"))}
    for path, channels in files.items():
        image = read_image(path)
        assert image.dtype == np.uint16 and np.array_equal(image, np.moveaxis(deep[..., :channels], 2, 0)), path.name
        assert tuple(read_header(path)) == (9, 12, channels), path.name


def test_class_indices_in_16_bit_color_are_not_zeros(tmp_path):
    labels = LABELS.astype(np.uint16)
    for n in (2, 3, 4):
        planes = [labels] * (n - 1) + [labels if n == 3 else labels * 0 + 65535]
        assert np.array_equal(read_labels(deep_png(tmp_path / f"{n}.png", np.dstack(planes))), LABELS)
    assert np.array_equal(read_labels(deep_tiff(tmp_path / "m.tif", np.dstack([labels] * 3), "<")), LABELS)


@pytest.mark.parametrize("colors", [[0, 0, 0, 255, 255, 255], [0, 0, 0, 200, 10, 10]], ids=["black and white", "red"])
def test_a_bmp_of_8_bits_with_two_colors(tmp_path, colors):
    mask = Image.fromarray((LABELS > 1).astype(np.uint8)).convert("P")
    mask.putpalette(colors)
    path = save(tmp_path / "two.bmp", mask)
    assert np.array_equal(read_labels(path), LABELS > 1)
    assert np.array_equal(read_image(path)[0], (LABELS > 1) * colors[3]) and read_header(path)[:2] == LABELS.shape


@pytest.mark.parametrize("kind", ["png", "bmp", "tif"])
def test_a_mask_whose_palette_has_white_first(tmp_path, kind):
    seen = LABELS > 1
    path = save(tmp_path / f"two.{kind}", Image.fromarray(np.dstack([seen.astype(np.uint8) * 255] * 3)).quantize(2))
    with pytest.raises(ValueError, match=rf"two\.{kind}: its palette shows the value 0 as #ffffff and 1 as #000000.*colors=\['#000000', '#ffffff'\]"):
        read_mask(path)
    assert np.array_equal(read_mask(path, colors=["#000000", "#ffffff"]), seen) and np.array_equal(read_mask(path, colors=["#ffffff", "#000000"]), ~seen)
    assert np.array_equal(read_mask(save(tmp_path / "two.gif", Image.fromarray(seen.astype(np.uint8) * 255).quantize(2))), seen)


def test_masks_in_inks(tmp_path):
    black = np.dstack([LABELS * 0] * 3 + [np.where(LABELS > 1, 0, 255).astype(np.uint8)])
    path = save(tmp_path / "inks.tif", Image.fromarray(black, "CMYK"))
    assert np.array_equal(read_labels(path), np.where(LABELS > 1, 255, 0)) and np.array_equal(read_mask(path), LABELS > 1)


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", np.zeros((50, 50), bool))
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    for name in ("bomb.png", "bomb.npz"):
        with pytest.raises(ValueError, match=rf"{name}: [\d,]+ pixels, more than the limit of 2,400"), pytest.warns() if name == "bomb.png" else monkeypatch.context():
            read_image(tmp_path / name)


# Pictures that are stored turned


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tag", [1, 3, 6])
def test_orientation_of_a_pair(tmp_path, kind, tag):
    "Both with the tag are turned alike; a mask without it fits where the sizes prove it, and is refused where they do not"
    exif = Image.Exif()
    exif[0x0112] = tag
    image = save(tmp_path / f"image.{kind}", COLOR, exif=exif)
    upright = read_labels(save(tmp_path / "mask.png", LABELS, exif=exif))
    assert read_pair_header(image, tmp_path / "mask.png")[:2] == read_image(image).shape[1:] == upright.shape
    assert np.array_equal(upright, {1: LABELS, 3: LABELS[::-1, ::-1], 6: np.rot90(LABELS, -1)}[tag])
    shown, stored = save(tmp_path / "shown.png", upright), save(tmp_path / "stored.png", LABELS)
    if tag == 3:
        with pytest.raises(ValueError, match=rf"image\.{kind} and shown\.png have different orientation tags \(EXIF\), 3 and 1"):
            read_pair_header(image, shown)
        return
    assert read_pair_header(image, shown)[:2] == upright.shape
    if tag == 6:
        with pytest.raises(ValueError, match=rf"image\.{kind} and stored\.png: .* 32 x 40 .* 40 x 32 .*orientation tag"):
            read_pair_header(image, stored)


# Names


def test_one_letter_in_two_forms(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Küvette") for form in ("NFC", "NFD"))
    images = touch(tmp_path / "i", f"{decomposed}1.png {composed}2.png")
    masks = touch(tmp_path / "m", f"{composed}1_mask.png {decomposed}2_mask.png")
    pairs = pair_files(images, masks)
    assert [i.stem[-1] + m.stem[-6] for i, m in pairs] == ["11", "22"]
    assert split_positions(relative_names([i for i, _ in pairs]), [f"{composed}1.png"])[1] == [0]
    assert split_positions([f"{composed}1.png", "x.png"], [f"{decomposed}1"])[1] == [0]


def test_equal_names_in_folders_are_different_images(tmp_path):
    folder = touch(tmp_path, "pA/1.png pA/2.png pB/1.png pB/2.png pC/3.png")
    files = relative_names(sorted(folder.rglob("*.png")))
    assert files == ["pA/1.png", "pA/2.png", "pB/1.png", "pB/2.png", "pC/3.png"]
    assert split_positions(files, ["pB/1", "3.png"])[1] == [2, 4]
    with pytest.raises(ValueError, match=r"'1', which 2 images are called: pA/1\.png, pB/1\.png"):
        split_positions(files, ["1"])
    assert {len(split_positions(files, 0.2, seed)[1]) for seed in range(10)} == {1}
    assert split_positions(files, 0.4, 1, r"^(p\w)/")[1] in ([0, 1], [2, 3])


# Masks without what is looked for, and masks in JPEG


def test_a_foreground_that_no_mask_has(tmp_path):
    masks = [save(tmp_path / f"{i}.png", (LABELS == i).astype(np.uint8) * 255) for i in range(3, 6)]
    check_foreground(masks, 255)
    with pytest.raises(ValueError, match=r"foreground=1: none of the 3 masks has it\. They hold 0 \(91\.7%\), 255 \(8\.3%\)"):
        check_foreground(masks, 1)


@pytest.mark.parametrize("options", [{}, {"foreground": 255}, {"n_classes": 2}], ids=str)
def test_a_foreground_that_is_ignored(tmp_path, options):
    folders = write_set(tmp_path, [(LABELS == i).astype(np.uint8) * 255 for i in range(3, 6)], suffix="")
    with pytest.raises(ValueError, match=r"ignore_index=255: beside it none of the 3 masks .* 0 \(91\.7%\), 255 \(8\.3%\)\. If 255 is the foreground"):
        create_dataloaders(*folders, ignore_index=255, num_workers=0, **options)


def test_class_indices_in_a_jpeg(tmp_path):
    path = save(tmp_path / "m" / "0.jpg", LABELS)
    with pytest.raises(ValueError, match=r"0\.jpg: a JPEG cannot hold class indices.*Values found: "):
        read_mask(path, 4)
    few = save(tmp_path / "few.jpg", np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0) - np.eye(64, dtype=np.uint8), quality=95)
    with pytest.raises(ValueError, match=r"few\.jpg: \d+ values.*JPEG.*range\(128, 256\)"):
        read_mask(few)
    save(tmp_path / "i" / "0.png", COLOR)
    assert any("1 masks are JPEG, or compressed with loss like it, which smears their edges: 0.jpg" in o for o in describe_masks(tmp_path / "i", tmp_path / "m")["warnings"])


def test_a_mask_is_opened_once(tmp_path, monkeypatch):
    opened = []
    paths = [save(tmp_path / "0.png", LABELS), save(tmp_path / "1.png", LABELS, format="JPEG"), save(tmp_path / "2.webp", LABELS, quality=90)]
    monkeypatch.setattr(Image, "open", lambda path, open_=Image.open: opened.append(path) or open_(path))
    read_mask(paths[0], 4)
    for path in paths[1:]:
        with pytest.raises(ValueError, match="cannot hold class indices"):
            read_mask(path, 4)
    assert opened == paths


# Arguments of a wrong type

WRONG = [3.5, -1, [], [1.5], {}, object(), np.array([1, 2]), (1, 2, 3), b"x", float("nan"), lambda: 0]
NOT_TYPES = {"masks", "images", "images_or_loader", "groups", "augment"}


@pytest.mark.parametrize("call", [create_dataloaders, describe_masks, get_augmentation_pipeline], ids=lambda o: o.__name__)
def test_an_argument_of_a_wrong_type_is_named(tmp_path, call):
    folders = write_set(tmp_path, [LABELS == 1, LABELS == 2, LABELS == 3], suffix="")
    given = {"images": folders[0], "masks": folders[1], "num_workers": 0} if call is create_dataloaders else {}
    given = {"images_or_loader": folders[0], "masks": folders[1]} if call is describe_masks else given
    refused = 0
    for name in inspect.signature(call).parameters.keys() - NOT_TYPES:
        for value in WRONG:
            try:
                call(**given | {name: value})
            except (ValueError, TypeError) as error:
                assert name in str(error), f"{name}={value!r}: {error}"
                refused += 1
    assert refused > {create_dataloaders: 100, describe_masks: 50, get_augmentation_pipeline: 30}[call]


# From the folder to the batch


@pytest.mark.parametrize("layout", ["Carvana", "DRIVE", "both before", "zeros", "nnU-Net"])
def test_loaders_read_the_masks_of_their_images(tmp_path, layout):
    "Image i is i all over, and the first i pixels of its mask are foreground"
    images, masks, _ = LAYOUTS[layout]
    pairs = pair_files(touch(tmp_path / "i", images), touch(tmp_path / "m", masks))
    for i, (image, mask) in enumerate(pairs, 1):
        save(image, np.full((32, 32), 80 * i, np.uint8), **({"quality": 100} if image.suffix == ".jpg" else {}))
        save(mask, (np.arange(1024).reshape(32, 32) < i).astype(np.uint8) * 255)
    train, val = create_dataloaders(tmp_path / "i", tmp_path / "m", batch_size=1, val=[1], augment=None, num_workers=0)
    for loader, i in ((train, 1), (val, 2)):
        image, mask = next(iter(loader))
        assert round(float(image.mean()) * 255) == 80 * i and int(mask.sum()) == i


def patients(folder):
    "Three slices, of equal names, of each of two patients"
    for patient in "AB":
        for i in range(3):
            save(folder / "i" / f"P{patient}" / f"{i}.png", COLOR)
            save(folder / "m" / f"P{patient}" / f"{i}.png", (LABELS == i).astype(np.uint8) * 255)
    return folder / "i", folder / "m"


def test_loaders_of_a_folder_for_each_patient(tmp_path):
    folders = patients(tmp_path)
    _, val = create_dataloaders(*folders, val=["PA/1", "PB/0.png"], augment=None, num_workers=0)
    assert [o.relative_to(tmp_path).as_posix() for o in val.dataset.images] == ["i/PA/1.png", "i/PB/0.png"]
    train, val = create_dataloaders(*folders, val=0.5, groups=r"^(P\w)/", augment=None, num_workers=0)
    assert len(val.dataset) == 3 and len({o.parent for o in val.dataset.images}) == len({o.parent for o in train.dataset.images}) == 1
    with pytest.raises(ValueError, match=r"'1', which 2 images are called: PA/1\.png, PB/1\.png"):
        create_dataloaders(*folders, val=["1"])


def test_loaders_refuse_a_foreground_that_no_mask_has(tmp_path):
    with pytest.raises(ValueError, match=r"foreground=1: none of the 6 masks has it\. They hold 0 \(75\.0%\), 255 \(25\.0%\)"):
        create_dataloaders(*patients(tmp_path), foreground=1)


def test_loaders_refuse_a_pair_that_is_turned_in_two_ways(tmp_path):
    folders, exif = patients(tmp_path), Image.Exif()
    exif[0x0112] = 3
    save(folders[0] / "PB" / "2.png", COLOR, exif=exif)
    with pytest.raises(ValueError, match=r"PB.2\.png and 2\.png have different orientation tags"):
        create_dataloaders(*folders)


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"n_channels": 3}], ids=str)
def test_a_data_set_refuses_a_pair_that_is_turned_in_two_ways(tmp_path, options):
    exif = Image.Exif()
    exif[0x0112] = 3
    image, mask = save(tmp_path / "1.png", COLOR, exif=exif), save(tmp_path / "1_mask.png", LABELS)
    with pytest.raises(ValueError, match=r"1\.png and 1_mask\.png have different orientation tags"):
        SegmentationDataset([image], [mask], 10, **options)


def test_loaders_look_at_each_header_once(tmp_path, monkeypatch):
    import unet_nbtrain.image_files as room

    folders, opened = patients(tmp_path), []
    monkeypatch.setattr(room, "open_raster", lambda path, open_=room.open_raster: opened.append(path) or open_(path))
    create_dataloaders(*folders, cache=False)
    assert len(opened) == len(set(opened)) > 6


@pytest.mark.parametrize("place, byte", [(60, 255), (8, 99), (6, 1)], ids=["damaged inside", "packed in an unknown way", "encrypted"])
def test_an_archive_that_cannot_be_unpacked_names_its_file(tmp_path, place, byte):
    path = tmp_path / "c.npz"
    np.savez_compressed(path, a=np.arange(4096, dtype=np.uint16).reshape(64, 64))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")  # Where the archive says once more how each file is packed
    for at in (place, directory + place + 2) if place < 10 else (place, place + 40):
        content[at] ^= byte
    path.write_bytes(content)
    for read in (read_image, read_labels):
        with pytest.raises(ValueError, match=r"c\.npz: "):
            read(path)
