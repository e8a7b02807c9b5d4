# [parameters]
lowbit run 00_start_here -p method=lsq -p bits=3 -p epochs=1
# [table]
lowbit report
# [end]
