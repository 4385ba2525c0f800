"Random weights in the layout of real bundles: the machinery is tested with them, not the accuracy."

import json
import warnings
from pathlib import Path

import torch
import torch.nn as nn

from tiny_nbdev.core import load_json, quiet_libraries, save_json, save_tensors, seed_for
from tiny_nbdev.data.captions import SUPERCLASS
from tiny_nbdev.diffusion.tokenizer import write_clip_tokenizer
from tiny_nbdev.models.bundle import MANIFEST, shipped_folder, write_bundle


def write_stand_in(
    folder,  # Folder of the bundle to write
    seed: int = 0,  # Of the random weights
    widths=(8, 16, 24, 32),  # Channels of the small ResNet12 that plays the teacher
) -> Path:  # The folder
    "Write random weights in the layout of the embedded bundle."
    from tiny_nbdev.classify.backbones import save_backbone
    from tiny_nbdev.classify.students import create_backbone
    from tiny_nbdev.diffusion.tiny import make_tiny_pipeline

    folder = Path(folder)
    make_tiny_pipeline(folder / "diffusion", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "stand-in"))
        save_backbone(
            create_backbone("resnet12", 32, widths=widths),
            folder / "teacher.safetensors",
            "resnet12",
            widths=list(widths),
        )
        save_backbone(create_backbone("conv4", 32), folder / "conv4.safetensors", "conv4")
    save_json(dict(stand_in=True), folder / "PROVENANCE.json")
    shipped = load_json(shipped_folder("embedded") / MANIFEST)
    write_bundle(folder, shipped | dict(title="Random weights for tests", base_classes=sorted(SUPERCLASS)[:3]))
    return folder


def make_token_pipeline(
    folder,  # Folder to write
):  # Its folder, and its ImageTokens
    "A small pipeline that reads image tokens of EfficientNet-Lite0."
    from tiny_nbdev.classify.encoders import encoder_record
    from tiny_nbdev.diffusion.image_tokens import ImageTokens
    from tiny_nbdev.diffusion.model import LatentDiffusion
    from tiny_nbdev.diffusion.tiny import make_tiny_pipeline

    out = make_tiny_pipeline(folder, prediction_type="v_prediction")
    model = LatentDiffusion.load(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(hidden=8, width=model.unet.config.cross_attention_dim, length=model.max_length)
        sha = encoder_record("efficientnet_lite0")["sha256"]
        tokens = ImageTokens("efficientnet_lite0", 64, source_side=22, encoder_sha256=sha, **sizes)
    tokens.save(out)
    return out, tokens


def make_prior_pipeline(
    folder,  # Folder to write
):  # Its folder
    "The same, and beside it a prior for the same encoder and sentences."
    from tiny_nbdev.diffusion.prior import RidgePrior, save_prior
    from tiny_nbdev.generate.unclip import prior_origin

    out, tokens = make_token_pipeline(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        texts, features = torch.randn(20, 384), torch.rand(20, 1280)
    save_prior(RidgePrior.fit(texts, features, about=prior_origin(tokens)), out / "prior.safetensors")
    return out


def _sd_parts(seed, width, image_size, n_tokens):  # The three networks of Stable Diffusion 1.5, narrow
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed_for(seed, "sd15 stand-in"))
    cross = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    unet = UNet2DConditionModel(
        sample_size=image_size // 8,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=cross,
        up_block_types=[t.replace("Down", "Up") for t in cross[::-1]],
        layers_per_block=2,
        cross_attention_dim=2 * width,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_tokens,
            hidden_size=2 * width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=n_tokens - 2,
            eos_token_id=n_tokens - 1,
            pad_token_id=n_tokens - 1,
            hidden_act="quick_gelu",
            projection_dim=2 * width,
        )
    )
    text.get_input_embeddings().weight.data.normal_(std=0.3)  # words must matter, also untrained
    return dict(unet=unet, vae=vae, text_encoder=text)


def _hat():  # A narrow network of HAT's class
    from spandrel.architectures.HAT import HAT

    return HAT(
        embed_dim=12,
        depths=(2,),
        num_heads=(2,),
        window_size=16,
        compress_ratio=3,
        squeeze_factor=6,
        mlp_ratio=2,
        upscale=4,
        upsampler="pixelshuffle",
        resi_connection="1conv",
        num_feat=8,
    )


def _pipeline_texts(prediction_type) -> dict:  # Path in the pipeline's folder to JSON, word for word as published
    parts = dict(
        feature_extractor=("transformers", "CLIPImageProcessor"),
        safety_checker=("stable_diffusion", "StableDiffusionSafetyChecker"),
        scheduler=("diffusers", "PNDMScheduler"),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
    )
    scheduler = dict(
        _class_name="PNDMScheduler",
        _diffusers_version="0.6.0",
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        trained_betas=None,
        clip_sample=False,
    )
    if prediction_type != "epsilon":
        scheduler["prediction_type"] = prediction_type
    index = dict(_class_name="StableDiffusionPipeline", _diffusers_version="0.6.0") | parts
    return {"model_index.json": index, "scheduler/scheduler_config.json": scheduler}


def write_sd15_stand_in(
    folder,  # Folder of the bundle to write
    seed: int = 0,  # Of the random weights
    prediction_type: str = "epsilon",  # What the UNet is said to predict: 'epsilon' (SD 1.5) or 'v_prediction'
    image_size: int = 64,  # Side of the diffusion model's images in pixels; 512 in SD 1.5
    student_size: int = 16,  # Side of the student's images; 84 in sd15
    width: int = 8,  # Channels of the first block; 320 in SD 1.5
) -> Path:  # The folder
    "Write random weights in the layout of sd15: the same classes, names and settings, only narrower."
    import timm

    folder = Path(folder)
    manifest, d = load_json(shipped_folder("sd15") / MANIFEST), folder / "diffusion"
    n_tokens = write_clip_tokenizer(d / "tokenizer", ["a photo of an object", "the", "cat", "dog"], 77)
    vit = dict(embed_dim=24, depth=2, num_heads=2)
    with torch.random.fork_rng(devices=[]), quiet_libraries(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # spandrel's HAT
        for name, net in _sd_parts(seed, width, image_size, n_tokens).items():
            net.save_pretrained(d / name, safe_serialization=True)
            # the repository has files in half precision too; nobody asks for them
            nn.Module.half(net).save_pretrained(d / name, safe_serialization=True, variant="fp16")
        for path in (p for p in manifest["files"] if p.startswith("teacher/")):
            net = timm.create_model(Path(path).stem, num_classes=0, **vit)
            save_tensors(net.state_dict(), folder / path, dict(format="pt"))
        save_tensors(_hat().state_dict(), folder / manifest["superres"]["path"])
    config = load_json(d / "vae" / "config.json")
    del config["scaling_factor"]  # not in the real one: diffusers' default of 0.18215 counts
    save_json(config, d / "vae" / "config.json")
    for name, content in _pipeline_texts(prediction_type).items():
        (d / name).parent.mkdir(exist_ok=True)
        (d / name).write_text(json.dumps(content, indent=2) + "\n")
    changes = dict(
        image_size=student_size,
        diffusion=manifest["diffusion"] | dict(image_size=image_size),
        encoders={n: e | dict(kwargs=vit) for n, e in manifest["encoders"].items()},
    )
    write_bundle(folder, manifest | changes, files=list(manifest["files"]))
    return folder
