# [ranks]
torchrun --nproc-per-node=2 -m lowbit train configs/digits_vit_nano.yaml --set train.epochs=5
# [end]
