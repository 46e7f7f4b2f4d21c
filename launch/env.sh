# shellcheck shell=bash
# The settings of a platform, each with its reason; the other scripts source this file.
#
#   source launch/env.sh gpu      # or tpu, cpu; '' looks what the host has
#   bash launch/env.sh gpu        # only prints what would be set
#
# A value that is already in the environment wins, flag by flag. Names and defaults are those of
# jax 0.12.0.1, NCCL 2.32.3 and libtpu 0.0.50.1; tests/launch/test_env.py asks the parsers.
# Nothing here was timed: no GPU or TPU was at hand.

v3_platform() {
  if [[ ${JAX_PLATFORMS:-} == cpu* ]]; then
    echo cpu
  elif [[ -e /dev/nvidiactl ]]; then
    echo gpu
  elif compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

# setting NAME VALUE REASON...
setting() {
  local state=''
  if [[ -n ${!1+x} ]]; then state=' (yours)'; else export "$1=$2"; fi
  echo "env: $1=${!1}$state  # ${*:3}" >&2
}

# flag VARIABLE --name=value REASON...
flag() {
  local -n v3_flags=$1
  local state='' shown=$2
  if [[ " ${v3_flags:-} " == *" ${2%%=*}"[=\ ]* ]]; then
    state=' (yours)'
    shown=$(grep -oE -- "${2%%=*}(=[^ ]*)?" <<<"$v3_flags" | tail -n 1)
  else
    v3_flags="${v3_flags:+$v3_flags }$2"
    export "${!v3_flags?}"
  fi
  echo "env: $1 $shown$state  # ${*:3}" >&2
}

gpu_settings() {
  # Report section 3.2.2: 20 of a Hopper's 132 SMs carry the all-to-all, 112 compute. Its own kernel
  # runs 10 channels of two SMs; a channel of NCCL is one CTA, so one SM.
  setting NCCL_MAX_CTAS 20 "SMs for collectives, the report's share of 132"
  setting NCCL_MAX_P2P_NCHANNELS 16 "all-to-all is send/recv: NCCL rounds its channels up to a power of two, 20 would take 32 SMs"
  setting NCCL_DEBUG WARN "a failed link is named in the log; a healthy run prints nothing"
  if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION+x} ]]; then # the old name; jax refuses both at once
    setting XLA_CLIENT_MEM_FRACTION 0.92 "the rest is for NCCL's buffers and CUDA's context, outside of XLA's pool"
  fi
  flag XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true "off by default; moves collectives beside compute, which the 112 SMs are left for"
  flag XLA_FLAGS --xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer=false "on by default; across hosts it gathers the whole operand on every node, instead of the tokens that go there"
  flag XLA_FLAGS --xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true "off by default; without it the exchange between hosts is refused"
  flag XLA_FLAGS --xla_gpu_all_gather_combine_threshold_bytes=268435456 "by default 30 MiB; larger messages fill 8 links of 50 GB/s"
  flag XLA_FLAGS --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456 "as above, for ZeRO's gradients"
  flag XLA_FLAGS --xla_gpu_all_reduce_combine_threshold_bytes=268435456 "as above, for gradients stored whole"
  flag XLA_FLAGS --xla_gpu_first_collective_call_terminate_timeout_seconds=600 "by default 40 s; communicators of 2048 ranks take longer to connect"
  flag XLA_FLAGS --xla_gpu_nccl_terminate_on_error=true "a lost peer ends the process, so that the scheduler starts the job again"
  # Left at their defaults on purpose: collectives are asynchronous and all-gather, all-reduce and
  # reduce-scatter pipelined across loop iterations already; one collective at a time is in flight
  # (xla_gpu_experimental_parallel_collective_overlap_limit=1), as in the report's figure 4.
  # The site's business: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_NET, NCCL_IB_SL.
}

tpu_settings() {
  # A SparseCore moves data while the TensorCores compute: what the 20 SMs are on a GPU. libtpu
  # refuses xla_tpu_enable_async_collective_fusion=true, the older way, on all but v5e.
  local kind
  for kind in dense_all_to_all ragged_all_to_all; do
    flag LIBTPU_INIT_ARGS "--xla_tpu_enable_sparse_core_collective_offload_$kind=true" "dispatch and combine leave the TensorCore"
  done
  for kind in all_gather reduce_scatter all_reduce; do
    flag LIBTPU_INIT_ARGS "--xla_tpu_enable_sparse_core_collective_offload_$kind=true" "parameters and gradients travel beside compute"
    flag LIBTPU_INIT_ARGS "--xla_tpu_enable_async_collective_fusion_fuse_$kind=false" "a collective fused into TensorCore code is not offloaded"
  done
  flag LIBTPU_INIT_ARGS --xla_tpu_use_tc_device_shape_on_sc=true "the SparseCore reads the TensorCore's layout: no copy between them"
  flag LIBTPU_INIT_ARGS --xla_tpu_enable_data_parallel_all_reduce_opt=true "several slices: gradients cross the data-centre network during the backward pass"
  flag LIBTPU_INIT_ARGS --xla_tpu_data_parallel_opt_different_sized_ops=true "as above, for tensors of unequal size"
}

cpu_settings() {
  setting JAX_PLATFORMS cpu "no accelerator to look for"
  flag XLA_FLAGS --xla_cpu_collective_call_terminate_timeout_seconds=600 "by default 40 s; a busy host compiles longer than that between two processes"
}

v3_settings() {
  local platform=${1:-$(v3_platform)}
  case $platform in
    gpu | tpu | cpu) "${platform}_settings" ;;
    *)
      echo "launch/env.sh: unknown platform '$platform'; use gpu, tpu or cpu" >&2
      return 2
      ;;
  esac
}

v3_settings "${1-}"
