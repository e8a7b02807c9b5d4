/* A small pool of threads, and buffers that each thread keeps.
 *
 * One call at a time uses the pool; a second Python thread that comes meanwhile works alone: results are the same.
 * Items are handed out in ranges as threads get free; workers that wake up too late for a call are not waited for. They
 * look for the next call for some microseconds before they sleep.
 * After a fork the child starts its own pool. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

enum { MOST_WORKERS = 255, LOOKS = 2000 };

static struct {
  pthread_mutex_t user;  /* whose work it is */
  pthread_mutex_t mutex; /* guards what follows up to `running`, and the two conditions */
  pthread_cond_t wake, idle;
  int workers, wanted, open;
  atomic_uint call;   /* changes with each call */
  atomic_int running; /* workers that have joined it and are not done */
  lb_range_fn fn;
  void *arg;
  int64_t items, grain;
  atomic_llong next;
} pool = {.user = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

/* Whatever the caller did to rounding and subnormals, the kernels use the default. */
static void work(void) {
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x1f80);
#endif
  for (;;) {
    const int64_t begin = atomic_fetch_add(&pool.next, pool.grain);
    if (begin >= pool.items) break;
    pool.fn(pool.arg, begin, lb_min(begin + pool.grain, pool.items));
  }
#if defined(__x86_64__)
  _mm_setcsr(mode);
#endif
}

static void alone(int64_t items, int64_t grain, lb_range_fn fn, void *arg) {
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x1f80);
#endif
  for (int64_t begin = 0; begin < items; begin += grain) fn(arg, begin, lb_min(begin + grain, items));
#if defined(__x86_64__)
  _mm_setcsr(mode);
#endif
}

static void *worker(void *argument) {
  const int me = (int)(intptr_t)argument;
  unsigned seen = 0;
  for (;;) {
    for (int i = 0; i < LOOKS && atomic_load_explicit(&pool.call, memory_order_relaxed) == seen; i++) PAUSE();
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
    seen = atomic_load(&pool.call);
    const int mine = pool.open && me < pool.wanted;
    if (mine) atomic_fetch_add(&pool.running, 1);
    pthread_mutex_unlock(&pool.mutex);
    if (!mine) continue;
    work();
    if (atomic_fetch_sub(&pool.running, 1) == 1) {
      pthread_mutex_lock(&pool.mutex);
      pthread_cond_signal(&pool.idle);
      pthread_mutex_unlock(&pool.mutex);
    }
  }
  return NULL;
}

static void before_fork(void) {
  pthread_mutex_lock(&pool.user);
  pthread_mutex_lock(&pool.mutex);
}

static void after_fork_parent(void) {
  pthread_mutex_unlock(&pool.mutex);
  pthread_mutex_unlock(&pool.user);
}

static void after_fork_child(void) { /* the workers stayed behind */
  pthread_mutex_init(&pool.user, NULL);
  pthread_mutex_init(&pool.mutex, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.idle, NULL);
  pool.workers = pool.wanted = pool.open = 0;
  atomic_store(&pool.call, 0);
  atomic_store(&pool.running, 0);
}

static void register_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* With `mutex` held: has at least `count` workers running if the system allows, and says how many there are. */
static int have_workers(int count) {
  if (count > MOST_WORKERS) count = MOST_WORKERS;
  if (pool.workers < count) {
    sigset_t all, before; /* signals are the program's business, not the workers' */
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.workers < count) {
      pthread_t thread;
      if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)pool.workers)) break;
      pool.workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
  }
  return pool.workers < count ? pool.workers : count;
}

void lb_parallel(int64_t threads, int64_t items, int64_t grain, lb_range_fn fn, void *arg) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  const int64_t ranges = (items + grain - 1) / grain;
  threads = lb_min(threads, ranges);
  if (threads < 2 || pthread_mutex_trylock(&pool.user)) {
    alone(items, grain, fn, arg);
    return;
  }
  pthread_once(&once, register_fork);
  pthread_mutex_lock(&pool.mutex);
  pool.fn = fn, pool.arg = arg, pool.items = items, pool.grain = grain;
  atomic_store(&pool.next, 0);
  pool.wanted = have_workers((int)lb_min(threads - 1, MOST_WORKERS));
  pool.open = 1;
  atomic_fetch_add(&pool.call, 1);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.mutex);
  work();
  pthread_mutex_lock(&pool.mutex);
  pool.open = 0;
  pthread_mutex_unlock(&pool.mutex);
  for (int i = 0; i < LOOKS && atomic_load(&pool.running); i++) PAUSE();
  if (atomic_load(&pool.running)) {
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load(&pool.running)) pthread_cond_wait(&pool.idle, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
  }
  pthread_mutex_unlock(&pool.user);
}

enum { KEEP = 32 << 20 };
typedef struct {
  void *at[LB_SLOTS];
  size_t size[LB_SLOTS];
} buffers;
static pthread_key_t buffers_key;

static void free_buffers(void *held) {
  for (int slot = 0; slot < LB_SLOTS; slot++) free(((buffers *)held)->at[slot]);
  free(held);
}

static void make_key(void) { pthread_key_create(&buffers_key, free_buffers); }

static buffers *own_buffers(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_key);
  buffers *own = pthread_getspecific(buffers_key);
  if (!own && (own = calloc(1, sizeof *own))) pthread_setspecific(buffers_key, own);
  return own;
}

void *lb_scratch(int slot, size_t bytes) {
  buffers *own = own_buffers();
  if (!own) return NULL;
  if (own->size[slot] < bytes) {
    bytes = (bytes + 4095) & ~(size_t)4095;
    free(own->at[slot]);
    own->size[slot] = 0;
    own->at[slot] = aligned_alloc(64, bytes);
    if (!own->at[slot]) return NULL;
    own->size[slot] = bytes;
  }
  return own->at[slot];
}

void lb_scratch_trim(void) {
  buffers *own = own_buffers();
  for (int slot = 0; own && slot < LB_SLOTS; slot++)
    if (own->size[slot] > KEEP) {
      free(own->at[slot]);
      own->at[slot] = NULL;
      own->size[slot] = 0;
    }
}
