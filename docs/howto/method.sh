# [new]
lowbit new quantizer my_method
# [test]
python -m pytest tests/quantizers/test_my_method.py tests/nn/test_convert.py -k my_method
# [end]
