import time
def test_it(world, server, program, tmp_path):
    job = world.job(tmp_path/"out", reference={"path": str(world/"truth")}, regions={"path": str(world/"districts.geojson"), "name": "district"})
    for _ in range(2):
        t=time.time(); e = program("run", str(job), api=server); print(time.time()-t, e.code); print(e.out); print(e.err)
    job = world.job(tmp_path/"o2", card="convolutions", scenes=[str(world/"large.tif")], tiling={"block": "112"})
    t=time.time(); e = program("run", str(job), api=server); print(time.time()-t, e.code); print(e.out); print(e.err)
    job = world.job(tmp_path/"o3", card="nearest-volume", scenes=[str(world/"volume.nii.gz")])
    t=time.time(); e = program("run", str(job), api=server); print(time.time()-t, e.code); print(e.out); print(e.err)
    import os; os.system(f"find {tmp_path} -type f | grep -v /c/")
