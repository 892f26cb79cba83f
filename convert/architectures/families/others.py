"""Architectures of which only the residual writers are known, and those that are refused.

Their GGUFs are run by llama.cpp, not by mlx-lm. The facts are read off llama.cpp's graphs
(src/models/*.cpp).
"""

from __future__ import annotations

from convert.architectures.architecture import edited, plain, post_norm, refused
from convert.architectures.families.deepseek import HYPER, STREAMS
from convert.architectures.families.reasons import DRAFTS, EMBEDS, SPEECH

_DIFFUSION = "diffusion model: llama.cpp generates with it in a program of its own"
_NORMED = "its embedding is normalized on its way into the stream, with the mean subtracted."

ARCHITECTURES = (
    *edited(
        "plamo falcon baichuan refact gptneox stablelm codeshell orion internlm2 minicpm minicpm3 "
        "xverse olmo olmoe openelm chatglm glm-dsa jais jais2 exaone exaone-moe bailingmoe "
        "bailingmoe2 dots1 dots3note arcee laguna hunyuan-moe hunyuan_vl hy_v3 smallthinker "
        "apertus minimax-m2 minimax-m3 pangu-embedded paddleocr mimo2 step35 spark2_5 maincoder "
        "mellum maple",
        plain(),
    ),
    *edited("kimi-linear bailingmoe3", plain(past_adapters="attn_output")),
    *edited("dream llada llada-moe rnd1", plain(note=_DIFFUSION)),
    *edited("gpt2 starcoder", plain(embeddings="token_embd position_embd")),
    *edited("mpt", plain(reads="ffn.act.scales", embeddings="token_embd position_embd")),
    *edited("arctic", plain(reads="ffn_norm_exps")),
    *edited("bitnet", plain(reads="attn_sub_norm ffn_sub_norm")),
    *edited(
        "dbrx",
        plain(
            reads="attn_output_norm", note="attn_output_norm stands before the feed-forward network"
        ),
    ),
    *edited("grovemoe", plain("ffn_down_chexps", reads="ffn_gate_chexps ffn_up_chexps")),
    *edited(
        "talkie", plain(reads="layer_output_scale", note="the embedding is added in every layer")
    ),
    *edited("hy_v4", plain(reads=HYPER, note=STREAMS)),
    *edited(
        "glm5-next",
        plain(
            reads=f"{HYPER} indexer_compressor_ape indexer_compressor_gate",
            note=STREAMS,
            past_adapters="attn_output",
        ),
    ),
    *edited(
        "kimi-k3",
        plain(
            "ffn_routed_up",
            reads="ffn_routed_down ffn_routed_norm attn_res_score ffn_res_score output_res_score",
            note="the experts write through ffn_routed_up; layers read earlier streams, mixed by "
            "scalars",
            feeds={"ffn_down_exps": "ffn_routed_up"},
            past_adapters="attn_output ffn_down ffn_down_shexp ffn_routed_up",
        ),
    ),
    *edited(
        "glm4moe",
        plain(
            reads="post_attention_norm",
            note="post_attention_norm stands before the feed-forward network",
        ),
    ),
    *edited("mamba mamba2 jamba falcon-h1", plain("ssm_out")),
    *(
        one
        for name, past in (("nemotron_h", ""), ("nemotron_h_moe", "ffn_latent_up"))
        for one in edited(
            name,
            plain(
                "ssm_out ffn_latent_up",
                reads="ffn_latent_down",
                note="where there is an ffn_latent_up, the experts write through it",
                feeds={"ffn_down_exps": "ffn_latent_up"},
                past_adapters=past,
            ),
        )
    ),
    *edited("afmoe muse-glimmer plamo3", post_norm()),
    *edited("plamo2", post_norm(more={"ssm_out": ("post_attention_norm",)})),
    *edited("grok", post_norm("attn_output_norm", "layer_output_norm|post_ffw_norm")),
    *refused(
        "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "
        "t5encoder",
        EMBEDS,
    ),
    *refused("eagle3 dflash", DRAFTS),
    *refused("wavtokenizer-dec pockettts", SPEECH),
    *refused("clip", "it is the vision half of a model: give the language half."),
    *refused("t5", "it has an encoder and a decoder, with a stream each."),
    *refused("gptj", "there is no implementation of it in llama.cpp."),
    *refused("bloom rwkv6 rwkv7", _NORMED),
    *refused("arwkv7", "its recurrent blocks have not been proved in llama.cpp."),
    *refused(
        "minimax-01",
        "its residual is the normalized stream, so that every norm's gain turns the direction.",
    ),
    *refused(
        "nanbeige",
        "its layers may run in loops with a norm in between, whose gain turns the direction.",
    ),
    *refused(
        "hrm_text",
        "its layers run in loops on two streams, one of which starts from a learned state.",
    ),
    *refused("chameleon", "it is implemented only in part in llama.cpp."),
    *refused("cogvlm", "image tokens run through weights of their own."),
    *refused("plm", "it has not been proved in llama.cpp."),
)
