# [cluster]
dask scheduler --host 127.0.0.1 --port 8786 &
dask worker tcp://127.0.0.1:8786 --nthreads 1 &
# [run]
lowbit run 00_start_here -p epochs=1 --executor dask://127.0.0.1:8786
# [end]
