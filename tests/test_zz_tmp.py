from tests.conftest import *
import sys
from r2vpo_jax.learner import Learner
def test_v(tiny_config, tiny_model, rollout, mesh):
    for lr in (3e-4,1e-3,3e-3):
        L=Learner(tiny_model[0], tiny_config(optimizer={"learning_rate":lr}), mesh)
        b=sharding.put_batch(rollout, mesh)
        for k in (0,1,7):
            vs=[]
            st=L.init_state(tiny_model[1])
            for n in range(4):
                st,stats=L.update(st, L.minibatch(b, jax.random.key(k), n)); vs.append(float(stats.mean("ratio_variance")))
            print(lr,k,vs,np.mean(vs))
