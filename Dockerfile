# The same environment with a GPU: CUDA 13.0, which the pinned torch wheel of PyPI is built for; packages from the same
# requirements.txt. The image has not been built by this project's tests (they have no Docker and no GPU): they parse
# this file and compare its CUDA version and its packages with requirements.txt.
#
#   docker build -t hobs-rspar:latest .
#   docker run --gpus all -it --ipc=host -v /path/to/imagenet:/data/imagenet \
#       -v $(pwd)/reports:/workspace/H-OBS-R-SPAR/reports hobs-rspar:latest
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# git: DVC works inside a Git repository. python3-venv: Ubuntu's Python comes without it.
RUN apt-get update && apt-get install -y --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/H-OBS-R-SPAR

# The packages first, so that an edit of the code does not install them again.
COPY Makefile requirements.txt ./
COPY tasks/setup.py tasks/
RUN make setup

COPY . .
# The copy belongs to root whoever built it; Git refuses a repository of somebody else otherwise.
RUN git config --global --add safe.directory /workspace/H-OBS-R-SPAR

CMD ["bash"]
