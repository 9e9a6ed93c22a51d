"""faiss's k-means on the rows that the benchmark `kmeans` wrote down; prints one JSON object."""
import json
import sys
import time

import faiss
from safetensors.numpy import load_file

path, clusters, iterations, threads = sys.argv[1], *map(int, sys.argv[2:])
faiss.omp_set_num_threads(threads)
rows = load_file(path)["rows"]
# All rows, as ours: faiss would otherwise train on a sample of 256 a cluster.
kmeans = faiss.Kmeans(rows.shape[1], clusters, niter=iterations, seed=7, max_points_per_centroid=len(rows))
began = time.perf_counter()
kmeans.train(rows)
distance, _ = kmeans.index.search(rows, 1)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "inertia": float(distance.mean())}))
