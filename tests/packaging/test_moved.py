"""Every module and public name of before the folders, by the names of then."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

from tokenflow_ext._deprecated import REMOVED_IN
from tokenflow_ext._moved import MOVED

# Modules of models/ and train/ before they had folders, with what they defined.
BEFORE = dict(
    paragraph.split(maxsplit=1)
    for paragraph in """
models.config QUANTIZER_KINDS TOWER_KINDS PRESETS SIDE_LIMIT WIDTH_LIMIT DEPTH_LIMIT CODES_LIMIT
    SCALES_LIMIT GRID_LIMIT ConfigError CheckpointError TowerConfig PixelConfig SemanticConfig
    QuantizerConfig TokenizerConfig to_plain from_plain

models.discriminators KINDS PatchDiscriminator StyleGanDiscriminator BlurHalve group_deviation
    build_discriminator

models.files TEXT_LIMIT OutputError shown brief check_regular read_text decode parse_json
    read_json inside utf8_name flush replacing remove_parts cannot_write write_file

models.losses semantic_loss reconstruction_loss hinge_d_loss logistic_d_loss hinge_g_loss
    non_saturating_g_loss DISCRIMINATOR_LOSSES GENERATOR_LOSSES discriminator_loss
    generator_loss adaptive_weight LPIPS LossParts tokenizer_loss

models.metrics SSIM_WINDOW to_uint8 to_unit psnr ssim code_usage FeatureSums frechet cosine

models.released CONTAINERS USAGE read recognise check released_name left_aside from_released
    to_released read_left_aside write

models.saved CONFIG_FILE WEIGHTS_FILE Config SavedForm read_weights not_finite read_safetensors
    write_safetensors read_torch write_torch

models.semantic CLIP_MEAN CLIP_STD SIGLIP_MEAN SIGLIP_STD IMAGENET_MEAN IMAGENET_STD
    MissingPackageError resample_positions PixelNorm Tower ClipTower VitaminTower SiglipTower
    EfficientNetLite0Tower build_tower Attention Mlp Block SemanticDecoder task_layer

models.teachers WeightsError find_efficientnet_lite0 read_state clip_from_transformers
    efficientnet_from_package load_tower build_teacher Teacher

models.text_to_image NEGATIVE_PROMPT TextToImageOutput TextToImage

models.text_to_image_backbone QK_NORM_EPS Rotary Cache RMSNorm rotary rotate Attention MLP Layer
    Backbone

models.text_to_image_generation KeyValueCache Session generate_tokens

models.text_to_image_released HEADER read read_header parse_header first_line split_aside write

models.text_to_image_rope RopeConfig

models.text_to_image_sequence FAMILIES ACTIVATIONS IMAGE_MARK TextTokenizer BackboneConfig
    check_header TextToImageConfig encode_prompts NextScaleSequence

models.tokenizer PARTS TokenizerOutput TokenFlowTokenizer CheckpointError

models.torchvision_shim register ensure_torchvision operators_load install

models.vision QuickGELU ClipBlock ClipTransformer SiglipEmbeddings SiglipAttention SiglipMlp
    SiglipBlock SiglipEncoder SameConv2d NormRelu6 SeparableBlock InvertedResidual
    efficientnet_lite0_blocks

models.vqgan group_norm ResnetBlock AttnBlock Downsample Upsample Encoder Decoder

train.analyse FORMAT VERSION CODEBOOKS DEFINITION PAPER Clusters codebooks_of nearest
    PhotographSquares assign names_of new_figure plot cluster_sheet run add_arguments command

train.captions Sample first_sentence vary find_caption list_captions Choice Pictures Tokens
    Shards Form Captioned open_source some collate

train.checkpoint FORMAT VERSION STATE_FILE MANIFEST_FILE digest write_text available tidy save
    verify load saved_config check_there find find_tokenizer load_tokenizer weights_digest
    add_tokenizer_arguments

train.cli reconstruct tokenize main

train.config DataConfig CaptionConfig PartRates OptimConfig TokenizerOptimConfig PixelLossConfig
    LossConfig CodebookConfig OutputConfig TextOptimConfig TextModelConfig SampleConfig
    TextConfig DecoderConfig TrainConfig leaves parse_overrides Config load_config
    load_decoder_config load_text_config from_yaml to_yaml

train.data HELD_OUT_BAND PHOTOGRAPHS check_counts counted_rng draw_round Picture Kept read_span
    photographs photograph_licences split read_weights checked_weight Source PictureSet listing
    RandomCrops Shard loader read_batches held_out_crops DataError open_image list_images

train.decoder train main

train.decoder_trainer with_enhanced_decoder DecoderTrainer

train.distributed Processes find_device Launcher processes

train.emojis PACKAGE VERSION SHA256 LICENCES unpack fetch from_tarball

train.entry main not_installed

train.evaluate FORMAT VERSION VGG16 Item EIGHT_BITS FIGURES PAPER Reconstruction Features
    Measured Squares join_squares digest_of to_float thinned evaluate inception_features
    lite0_features choose_features choose_perceptual choose_teacher as_table as_page FILES write
    environment run add_reading_arguments reading add_arguments command

train.fid WEIGHTS find_weights inception fid

train.generate STEPS LAYOUTS Prompt Painter facts check_text plain_prompts read_prompts Picture
    pictures claim write grid_of tile labelled

train.images open_images

train.language TEXT_FOLDER load_language_model make_text_tokenizer load_text_tokenizer

train.logs RunLog over_under table

train.loop PRECISIONS learning_rate NotFiniteError BaseTrainer train read_arguments run_command

train.messages EXPECTED one_line ending_in_one_line

train.outputs json_text png distinct_names check_folder check_new_folder write_folder Outputs
    add_overwrite OutputError

train.parallel whole split_like split_weights is_split reshard distribute exchange
    average_gradients clip_gradients Average model_state load_model_state optimizer_state
    load_optimizer_state load_scheduler_state not_finite

train.pictures PREPROCESSING BrokenImageError formats suffixes list_images find_images
    open_image check_depth to_square read_square to_tensor to_pixels

train.reading METADATA DataError printable say check_file require_file reason inside read_text
    decode lines parse_json read_json json_lines Tally

train.runs CONFIG_FILE LOCK_FILE OUTPUTS Config lock FIXED PLACES changes begin settle

train.shards Member read_members list_shards beside Shards first_pictures

train.text_to_image train main

train.text_trainer TextTrainer

train.tokenizer notice train main

train.tokens FORMAT VERSION INDEX UNFINISHED fingerprint data_digest facts encoded check_target
    Shard writing finish is_tokens read

train.trainer check_memory Trainer
""".strip().split("\n\n")
)


@pytest.mark.parametrize("name", BEFORE)
def test_old_names_are_there(name):
    module_name = f"tokenflow_ext.{name}"
    sys.modules.pop(module_name, None) if module_name in MOVED else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(module_name)
    told = [str(warning.message) for warning in caught if "has moved to" in str(warning.message)]
    if module_name in MOVED:
        [said] = told
        assert f"{module_name} has moved to {' and '.join(MOVED[module_name])}; " in said
        assert f"goes in tokenflow_ext {REMOVED_IN}" in said
    else:  # a folder has the name now
        assert told == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some names have changed since
        assert [each for each in BEFORE[name].split() if not hasattr(module, each)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_it_is_the_module_itself_and_not_a_copy():
    """What is set in it by its old name is seen by the new one; the warning is at the import."""
    code = """
import warnings
from tokenflow_ext.models.tokenizer import original_checkpoint
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from tokenflow_ext.models import released
    import tokenflow_ext.train.shards
print(released is original_checkpoint, released.__spec__.name)
print([(warning.filename, warning.lineno) for warning in caught])
from tokenflow_ext.models.config import TokenizerConfig, TowerConfig, to_plain
from tokenflow_ext.models.tokenizer.config import TokenizerConfig as New
print(TokenizerConfig is New)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "True tokenflow_ext.models.tokenizer.original_checkpoint",
        "[('<string>', 6), ('<string>', 7)]",
        "True",
    ], done.stderr


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"tokenflow_ext\.models\.never"):
        importlib.import_module("tokenflow_ext.models.never")


def test_no_module_here_is_imported_by_an_old_name():
    code = """
import importlib, pkgutil, warnings, tokenflow_ext
warnings.filterwarnings("error", ".* has moved to ", DeprecationWarning)
found = pkgutil.walk_packages(tokenflow_ext.__path__, "tokenflow_ext.")
names = [module.name for module in found if not module.name.endswith("libtokenflow_ops")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(MOVED)
